"""AdamW and the global norm on the emulated device: many tensors at once, numbers in memory, bfloat16 copies, recorded."""

from __future__ import annotations

import importlib
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import backend, ops
from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.images import variant
from fastlm.cuda.recording import Recording
from fastlm.cuda.table import KERNELS
from tests.gpu.build import gpu_build

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import fastlm.cuda.interpreter  # noqa: F401  before triton

SHAPES = [(3,), (129, 51), (1,), (0, 4), (4096,), (8193,)]
DECAYS = [0.0, 0.1, 0.0, 0.1, 0.2, 0.0]
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": DECAYS}


@pytest.fixture(params=["cuda", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton"))])
def on(request):
    folder = KERNELS.parent / "build/emulated"
    gpu_build().emulate("adamw", folder)
    before = Emulated.damaged
    with emulated(twin=request.param, libraries=folder, seed=2) as device:
        yield device
        if request.param == "triton":
            listed = {variant(*v) for v in importlib.import_module("fastlm.kernels.adamw.adamw_triton").variants()}
            assert device.launched.get("adamw", set()) <= listed
    assert Emulated.damaged == before, "memory outside of an array was written"


def made():
    """Parameters, gradients, m and v."""
    rng = np.random.default_rng(0)
    return [[rng.random(s).astype(np.float32) for s in SHAPES] for _ in range(4)]


def assert_near(there, here):
    for group, expected in zip(there, here, strict=True):
        for x, y in zip(group, expected, strict=True):
            np.testing.assert_allclose(x.numpy(), y, rtol=2e-6, atol=6e-8)  # half an ulp of 1: parameters and steps cancel


@pytest.mark.parametrize("step", [1, 17, 1000])
def test_many_tensors(on, step):
    """As on the CPU, with numbers from the host and with numbers from memory; the copies are the parameters, rounded."""
    here, there, again = made(), [[on.put(x) for x in g] for g in made()], [[on.put(x) for x in g] for g in made()]
    ops.adamw_step(*here, step=step, lr=1e-2, scale=0.5, **SETTINGS)
    copies = [on.empty(s, ml_dtypes.bfloat16) for s in SHAPES]
    ops.adamw_step(*there, step=step, lr=1e-2, scale=0.5, copies=copies, **SETTINGS)
    numbers = {"step": on.put(np.array([step], np.int32)), "lr": on.put(np.array([1e-2], np.float32))}
    ops.adamw_step(*again, **numbers, scale=on.put(np.array([0.5], np.float32)), **SETTINGS)
    assert_near(there, here)
    assert_near(again, here)
    for c, p in zip(copies, there[0], strict=True):
        np.testing.assert_array_equal(c.numpy(), p.numpy().astype(ml_dtypes.bfloat16))


def test_norm_and_clipping(on):
    """No overflow for a gradient of 1e30; a norm that is not finite makes a step that changes nothing."""
    gradients = made()[1]
    exact = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in gradients))
    norm = ops.global_norm([on.put(g) for g in gradients])
    assert norm.item() == pytest.approx(exact, rel=1e-7)
    for clip in (1.0, 1e6):
        assert ops.clip_scale(norm, clip).item() == pytest.approx(ops.clip_scale(float(exact), clip), rel=1e-6)
    assert ops.global_norm([on.put(np.full(4, 1e30, np.float32))]).item() == pytest.approx(2e30, rel=1e-6)
    for bad in (np.nan, np.inf):
        gradients[1][3, 5] = bad
        scale = ops.clip_scale(ops.global_norm([on.put(g) for g in gradients]), 1.0)
        assert np.isnan(scale.numpy()).all()
        assert np.isnan(ops.clip_scale(float(bad), 1.0))
        there = [[on.put(x) for x in g] for g in made()]
        ops.adamw_step(*there, step=1, lr=1e-2, scale=scale, **SETTINGS)
        assert_near(there, made())


def test_recorded(on):
    """A recorded step reads step, lr and the gradients anew; without numbers in memory it cannot be recorded."""
    here, there = made(), [[on.put(x) for x in g] for g in made()]
    step, lr = on.put(np.array([1], np.int32)), on.put(np.array([1e-2], np.float32))

    def update():
        scale = ops.clip_scale(ops.global_norm(there[1]), 1.0)
        ops.adamw_step(*there, step=step, lr=lr, scale=scale, **SETTINGS)

    recording = Recording(on, update)
    assert recording.refused == ""
    on.assign(step, on.put(np.array([2], np.int32)))
    on.assign(lr, on.put(np.array([3e-3], np.float32)))
    recording.run()
    for at, rate in ((1, 1e-2), (2, 3e-3)):
        scale = ops.clip_scale(ops.global_norm(here[1]), 1.0)
        ops.adamw_step(*here, step=at, lr=rate, scale=scale, **SETTINGS)
    assert_near(there, here)
    frozen = Recording(on, lambda: ops.adamw_step(*there, step=1, lr=1e-2, **SETTINGS))
    assert "host to the device" in frozen.refused


def test_refuses(on):
    a = [on.put(np.zeros(4, np.float32)) for _ in range(4)]
    with pytest.raises(TypeError, match=r"\[adamw\] step must be a number or one element of int32, got DeviceArray"):
        ops.adamw(*a, step=on.put(np.array([1.0], np.float32)), lr=1e-3)
    with pytest.raises(TypeError, match=r"step must be a number or one element of int32, where the parameters are on a device"):
        ops.adamw(*(backend.host(x) for x in a), step=on.put(np.array([1], np.int32)), lr=1e-3)
    with pytest.raises(TypeError, match=r"gradient 0 must be float32 on the device that the others are on"):
        ops.adamw(a[0], on.put(np.zeros(4, ml_dtypes.bfloat16)), a[2], a[3], step=1, lr=1e-3)
    with pytest.raises(TypeError, match=r"copies\[0\] must be contiguous bfloat16 on the device"):
        ops.adamw_step([a[0]], [a[1]], [a[2]], [a[3]], step=1, lr=1e-3, copies=[a[0]])
    with pytest.raises(ValueError, match=r"copies are written on a device only"):
        ops.adamw_step(*([np.zeros(4, np.float32)] for _ in range(4)), step=1, lr=1e-3, copies=[])
