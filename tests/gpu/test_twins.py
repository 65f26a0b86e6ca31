"""Both GPU twins of every operation on the cases of the CPU: Triton by its interpreter, CUDA C++ by the emulator."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest

from fastlm.cuda.emulated import SCHEDULES, Emulated, emulated
from fastlm.cuda.images import variant
from fastlm.cuda.runtime import device
from fastlm.cuda.table import KERNELS
from fastlm.testing import case_id, cases, check_backward, check_forward, oracle
from tests.gpu.build import gpu_build

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import fastlm.cuda.interpreter  # noqa: F401  before triton
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the Triton layer needs triton")


COPIED_BY_TRITON = ("attention",)  # head dimensions that are no multiple of 16
USERS = {"matmul": ("linear",)}  # operations whose kernels are in another's folder


def ops(pattern):
    folders = sorted(p.parent for p in KERNELS.glob(pattern))
    found = [f.name for f in folders if (f / f"{f.name}_ref.py").exists()]
    users = USERS | ({"cross_entropy": ("linear_cross_entropy",)} if "triton" in pattern else {})  # of more than one folder
    return found + [user for op in found for user in users.get(op, ())]


def each(pattern):
    params = [(op, c) for op in ops(pattern) for c in cases(op) if not c.get("large")]  # large: more than emulation can bear
    return pytest.mark.parametrize(("op", "case"), params, ids=lambda v: v if isinstance(v, str) else case_id(v))


def check(op, case):
    """The case on the device in use, forward and backward, as the CPU's test calls the operation."""
    module = importlib.import_module(f"tests.kernels.test_{op}")
    call = getattr(module, "call", None) or getattr(importlib.import_module("fastlm.ops"), op, None)
    before = Emulated.damaged
    if hasattr(module, "check_on_device"):  # what an operation compares in its own way
        module.check_on_device(case, device().put)
    else:
        check_forward(op, call, case, put=device().put)
    if hasattr(module, "check_backward_on_device"):
        module.check_backward_on_device(case, device().put)
    elif getattr(oracle(op), "GRADIENTS", ()):
        check_backward(op, call, case, put=device().put)
    assert Emulated.damaged == before, "memory outside of an array was written"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@needs_triton
@each("*/*_triton.py")
def test_triton(op, case):
    with emulated(twin="triton") as on:
        check(op, case)
    for name, launched in on.launched.items():
        module = importlib.import_module(f"fastlm.kernels.{name}.{name}_triton")
        listed = {variant(*v) for v in module.variants()}
        assert launched <= listed, f"{launched - listed} would not be compiled ahead of time"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", SCHEDULES)
@each("*/*_cuda.cu")
def test_cuda(op, case, seed):
    if op in COPIED_BY_TRITON and not HAS_TRITON:
        pytest.skip("head dimensions that are no multiple of 16 are copied by Triton")
    folder = KERNELS.parent / "build/emulated"
    owner = next((o for o, users in USERS.items() if op in users), op)
    if owner == "matmul" and not HAS_TRITON:
        pytest.skip("few rows and odd sizes go to Triton")
    for needed in {owner, "add"}:
        gpu_build().emulate(needed, folder)
    with emulated(twin="cuda", libraries=folder, seed=seed):
        check(op, case)


def test_not_on_the_host():
    """NumPy never reads a device's array by itself."""
    with emulated() as on:
        a = on.put(np.ones((2, 3), np.float32))
        with pytest.raises(TypeError, match=r"call \.numpy\(\)"):
            np.asarray(a)
        with pytest.raises(TypeError):
            a + np.ones(3)
        assert a[:, 1:].numpy().shape == (2, 2)


@pytest.mark.parametrize("twin", [pytest.param("triton", marks=needs_triton), "cuda"])
def test_add(twin):
    """Equal shapes, and y repeated over the last axes; out may be x."""
    rng = np.random.default_rng(0)
    gpu_build().emulate("add", KERNELS.parent / "build/emulated")
    x, y = rng.standard_normal((7, 3, 33), np.float32), rng.standard_normal((3, 33), np.float32)
    with emulated(twin=twin, libraries=KERNELS.parent / "build/emulated") as on:
        a, b = on.put(x), on.put(y)
        out = on.empty(x.shape)
        on.table.add(out, a, b)
        np.testing.assert_array_equal(out.numpy(), x + y)
        on.table.add(a, a, out)
        np.testing.assert_array_equal(a.numpy(), x + (x + y))


def test_a_missing_barrier_is_caught(tmp_path):
    """Layer norm without a barrier in its sums: some schedule shows it, while the right one passes them all (test_cuda)."""
    for needed in ("layer_norm", "add"):
        gpu_build().emulate(needed, tmp_path, ("FASTLM_PLANT_NO_BARRIER",))
    case, caught = cases("layer_norm")[0], 0
    for seed in SCHEDULES:
        with emulated(twin="cuda", libraries=tmp_path, seed=seed):
            try:
                check("layer_norm", case)
            except AssertionError:
                caught += 1
    assert caught
