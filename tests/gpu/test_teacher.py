"""Losses against a teacher and over numbers, on the emulated device: against the CPU, which computes them in float64."""

from __future__ import annotations

import importlib
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import ops
from fastlm.cuda.emulated import emulated
from fastlm.cuda.images import variant
from fastlm.tensor import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the Triton layer needs triton", allow_module_level=True)
import fastlm.cuda.interpreter  # noqa: F401  before triton

BFLOAT16 = ml_dtypes.bfloat16


def normal(*shape, seed=0):
    """float32 numbers that bfloat16 holds."""
    return 2 * np.random.default_rng(seed).standard_normal(shape, np.float32).astype(BFLOAT16).astype(np.float32)


def compare(call, x, *targets, dtype=np.float32):
    """Loss and gradient, for a gradient of the loss that is not 1; and the loss alone."""
    ours = Tensor(x, requires_grad=True)
    want = call(ours, *targets)
    want.backward(np.array(0.75, np.float32))
    with emulated(twin="triton") as on:
        there = [on.put(t.astype(dtype)) if t.dtype == np.float32 and call in TEACHER else t for t in targets]
        tensor = Tensor(on.put(x.astype(dtype)), requires_grad=True)
        got = call(tensor, *there)
        got.backward(on.put(np.array(0.75, np.float32)))
        loss, gradient = got.data.numpy(), tensor.grad.numpy().astype(np.float32)
        alone = call(tensor.data, *there).numpy()
    assert loss.shape == ()
    assert loss.dtype == np.float32
    np.testing.assert_array_equal(alone, loss)
    np.testing.assert_allclose(loss, want.data, rtol=2e-6, atol=1e-6)
    rtol = 1e-5 if dtype == np.float32 else 2.0**-7 if call in TEACHER else 2.0**-8  # rounded twice: for dy = 1, and times dy
    np.testing.assert_allclose(gradient, ours.grad, rtol=rtol, atol=1e-6 * float(np.abs(ours.grad).max(initial=0)) + 1e-9)
    for op, launched in on.launched.items():
        module = importlib.import_module(f"fastlm.kernels.{op}.{op}_triton")
        assert launched <= {variant(*v) for v in module.variants()}


def kl(x, t):
    return ops.kl_divergence(x, t, 2.5)


TEACHER = (kl, ops.cosine_distance)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("shape", [(3, 33), (2, 1), (2, 2, 5000)])
@pytest.mark.parametrize("call", TEACHER)
def test_teacher(call, shape, dtype):
    compare(call, normal(*shape), normal(*shape, seed=1), dtype=dtype)


def test_impossible_tokens():
    """A token that the teacher rules out adds nothing; a row of zeros has distance 1."""
    x, t = normal(4, 50), normal(4, 50, seed=1)
    t[1, 3:20] = -np.inf
    t[2, :49] = -np.inf
    compare(kl, x, t)
    zeros = np.zeros((2, 7), np.float32)
    with emulated(twin="triton") as on:
        assert float(ops.cosine_distance(on.put(zeros), on.put(zeros + 1)).item()) == 1.0


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (1100,)])
def test_regression(shape, dtype):
    x = normal(*shape) * 4
    compare(ops.mean_squared_error, x, np.random.default_rng(2).standard_normal(shape), dtype=dtype)
    targets = np.random.default_rng(3).integers(0, 2, shape).astype(np.float64)
    targets.reshape(-1)[::3] = -100
    compare(ops.binary_cross_entropy, x, targets, dtype=dtype)
    compare(ops.binary_cross_entropy, x, np.full(shape, -100.0), dtype=dtype)


def test_refusals():
    with emulated(twin="triton") as on:
        x = on.put(normal(2, 3))
        with pytest.raises(ValueError, match=r"\[binary_cross_entropy\] targets must be from 0 to 1"):
            ops.binary_cross_entropy(x, np.full((2, 3), 2.0))
        assert np.isnan(ops.binary_cross_entropy(x, on.put(np.full((2, 3), 2.0, np.float32))).item())
        with pytest.raises(TypeError, match=r"\[kl_divergence\] the teacher's must be float32 as ours, got bfloat16"):
            ops.kl_divergence(x, on.put(normal(2, 3).astype(BFLOAT16)))
        with pytest.raises(ValueError, match=r"\[mean_squared_error\] targets must be the shape of x = \(2, 3\), got \(3,\)"):
            ops.mean_squared_error(x, np.zeros(3))
