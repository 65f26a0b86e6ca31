"""Sampling on the emulated device beyond the CPU's cases: random numbers, what has no token, argmax, bfloat16, recorded."""

from __future__ import annotations

import importlib
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import ops
from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.images import variant
from fastlm.cuda.recording import Recording
from fastlm.cuda.table import KERNELS
from fastlm.ops.sample import refuse_negative
from tests.gpu.build import gpu_build

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import fastlm.cuda.interpreter  # noqa: F401  before triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((4, 700), np.float32)


@pytest.fixture(params=["cuda", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton"))])
def on(request):
    folder = KERNELS.parent / "build/emulated"
    gpu_build().emulate("sampling", folder)
    before = Emulated.damaged
    with emulated(twin=request.param, libraries=folder, seed=2) as device:
        yield device
        if request.param == "triton":
            listed = {variant(*v) for v in importlib.import_module("fastlm.kernels.sampling.sampling_triton").variants()}
            assert device.launched.get("sampling", set()) <= listed
    assert Emulated.damaged == before, "memory outside of an array was written"


@pytest.mark.parametrize(
    "random",
    [
        {"seed": 7, "step": 3},
        {"seed": 7, "step": [1, 2, 3, 4]},
        {"seed": [1, -5, 1 << 63, 4], "step": [9, 1 << 40, 0, 2]},
        {"seed": [1, 2, 3, 4], "step": 5},
    ],
    ids=["one stream", "steps", "streams", "streams, one step"],
)
def test_random_numbers_are_the_cpus(on, random):
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    want = ops.sample(LOGITS, **settings, **random)
    np.testing.assert_array_equal(ops.sample(on.put(LOGITS), **settings, **random).numpy(), want)


def test_bfloat16_and_out(on):
    """bfloat16 logits choose what their float32 copies choose; the tokens go where they are asked for."""
    narrow = LOGITS.astype(ml_dtypes.bfloat16)
    out = on.empty((4,), np.int32)
    got = ops.sample(on.put(narrow), top_p=0.9, seed=1, out=out)
    assert got is out
    np.testing.assert_array_equal(out.numpy(), ops.sample(narrow.astype(np.float32), top_p=0.9, seed=1))
    np.testing.assert_array_equal(ops.argmax(on.put(narrow)).numpy(), np.argmax(narrow.astype(np.float32), axis=-1))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_rows_without_a_token(on, settings):
    """They get the CPU's statuses, which `refuse_negative` explains; the other rows get their tokens."""
    x = LOGITS.copy()
    x[0, 600], x[1], x[2, 3] = np.nan, -np.inf, np.inf
    got = ops.sample(on.put(x), seed=1, **settings).numpy()
    assert got[:2].tolist() == [-1, -2]
    assert got[2] == (3 if settings.get("temperature") == 0 else -3)
    assert got[3] == ops.sample(np.tile(x[3], (4, 1)), seed=1, **settings)[3]
    with pytest.raises(ValueError, match=r"\[sample\] logits row 0 has nan"):
        refuse_negative(got)
    bad = ops.sample(on.put(LOGITS[:2]), repetition_penalty=2.0, previous=[[0], [700]], seed=1, **settings).numpy()
    assert bad[0] >= 0
    assert bad[1] == -4
    bad = ops.sample(on.put(LOGITS[:2]), uniform=np.array([0.5, 1.0]), **settings).numpy()
    assert bad[0] >= 0
    assert bad[1] == -5


@pytest.mark.parametrize("N", [1, 31, 1000, 9000])
def test_argmax(on, N):
    x = np.round(RNG.standard_normal((3, N), np.float32))
    x[1, -1] = 9
    np.testing.assert_array_equal(ops.argmax(on.put(x)).numpy(), np.argmax(x, axis=-1))
    x[2, N // 2] = np.nan
    assert ops.argmax(on.put(x)).numpy().tolist() == [np.argmax(x[0]), N - 1, -1]
    x[1] = -np.inf
    assert ops.argmax(on.put(x)).numpy().tolist() == [np.argmax(x[0]), 0, -1]
    assert ops.argmax(on.put(x), token=True).numpy().tolist() == [np.argmax(x[0]), -2, -1]


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(("shape", "k"), [((2, 3, 5), 5), ((1, 1), 1), ((2, 4100), 7), ((0, 9), 2)])
def test_top_k(on, shape, k):
    """Values and indices of the CPU, with many equal ones and zeros of both signs; a row with nan has no indices."""
    x = np.random.default_rng(k).integers(-3, 3, shape).astype(np.float32)
    x[x == 1] = -0.0
    for dtype in (np.float32, ml_dtypes.bfloat16):
        values, indices = ops.top_k(on.put(x.astype(dtype)), k)
        for got, want in zip((values, indices), ops.top_k(x, k), strict=True):
            np.testing.assert_array_equal(got.numpy(), want)
    x[..., -1] = -np.inf
    np.testing.assert_array_equal(ops.top_k(on.put(x), k)[1].numpy(), ops.top_k(x, k)[1])
    if x.size:
        x.reshape(-1, shape[-1])[0, -1] = np.nan
        indices = ops.top_k(on.put(x), k)[1].numpy().reshape(-1, k)
        assert (indices[0] == -1).all()
        assert (indices[1:] >= 0).all()
    with pytest.raises(ValueError, match=r"\[top_k\] k must be from 1 to"):
        ops.top_k(on.put(x), shape[-1] + 1)


def test_top_p_at_the_boundary(on):
    row = np.log(np.array([0.2, 0.4, 0.1, 0.3], np.float32))
    uniform = np.array([0.05, 0.6, 0.9])
    for p, count in ((0.7, 2), (0.71, 3), (0.0, 1)):
        got = ops.sample(on.put(np.tile(row, (3, 1))), top_p=p, uniform=uniform).numpy()
        np.testing.assert_array_equal(got, ops.sample(np.tile(row, (3, 1)), top_p=p, uniform=uniform))
        assert set(got.tolist()) <= set(np.argsort(-row)[:count].tolist())


def test_recorded(on):
    """A recorded draw counts its steps on the device: each run draws what the CPU draws at that step."""
    x, seeds = on.put(LOGITS), on.put(np.array([5, 6, 7, 8], np.uint64))
    steps, token = on.put(np.zeros(4, np.int64)), on.empty((4,), np.int32)
    one = on.put(np.array([1, 1, 1, 1], np.int64))
    recording = Recording(on, lambda: ops.sample(x, top_k=30, seed=seeds, step=steps, out=token))
    assert recording.refused == ""
    for step in (0, 1):
        if step:
            on.assign(steps, one)
            recording.run()
        np.testing.assert_array_equal(token.numpy(), ops.sample(LOGITS, top_k=30, seed=[5, 6, 7, 8], step=step))
