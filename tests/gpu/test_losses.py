"""Cross-entropy and log softmax on the emulated device, beyond the CPU's cases: bfloat16, targets on the device, in place, not finite."""

from __future__ import annotations

import importlib
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from fastlm import ops
from fastlm.cuda.emulated import Emulated, emulated
from fastlm.cuda.images import variant
from fastlm.cuda.table import KERNELS
from fastlm.tensor import Tensor
from tests.gpu.build import gpu_build

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import fastlm.cuda.interpreter  # noqa: F401  before triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
RNG = np.random.default_rng(0)
BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(params=["cuda", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton"))])
def on(request):
    folder = KERNELS.parent / "build/emulated"
    for op in ("cross_entropy", "add"):
        gpu_build().emulate(op, folder)
    before = Emulated.damaged
    with emulated(twin=request.param, libraries=folder, seed=1) as device:
        yield device
        if request.param == "triton":
            listed = {variant(*v) for v in importlib.import_module("fastlm.kernels.cross_entropy.cross_entropy_triton").variants()}
            assert device.launched["cross_entropy"] <= listed
    assert Emulated.damaged == before, "memory outside of an array was written"


def expected(logits, targets, scale):
    """Losses and the gradient of their sum * scale, in float64."""
    x = logits.astype(np.float64)
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    valid = targets >= 0
    at = np.arange(len(x)), np.where(valid, targets, 0)
    loss = np.where(valid, -np.log(p[at]), 0)
    p[at] -= 1
    return loss, p * scale * valid[:, None]


@pytest.mark.parametrize("V", [16, 33, 4112])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_gradient_in_the_place_of_the_logits(on, V, dtype):
    """The kernel writes dlogits over the logits, in their dtype; rows begin at odd addresses."""
    logits = (3 * RNG.standard_normal((5, V), np.float32)).astype(dtype)
    targets = np.array([0, -100, V - 1, 3, 7], np.int32)
    loss, gradient = expected(logits, targets, 0.25)
    x, t = on.put(logits), on.put(targets)
    found, stats, scale = on.empty((5,)), on.empty((5, 2)), on.empty((1,))
    on.table.cross_entropy_scale(scale, t, -100, True)
    on.table.cross_entropy_forward(found, stats, x, x, t, -100, scale)
    np.testing.assert_allclose(found.numpy(), loss, rtol=1e-6, atol=1e-6)
    tolerance = 1e-6 if dtype == np.float32 else 2**-8 * np.abs(gradient).max()
    np.testing.assert_allclose(x.numpy().astype(np.float64), gradient, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_targets_on_the_device(on, dtype):
    """The mean is taken on the device; a target out of range gives nan, where the host's would be refused."""
    logits, targets = RNG.standard_normal((4, 50), np.float32), np.array([3, -100, 49, 0], dtype)
    x = Tensor(on.put(logits), requires_grad=True)
    loss = ops.cross_entropy(x, on.put(targets))
    loss.backward(on.put(np.array(2, np.float32)))
    losses, gradient = expected(logits, targets, 2 / 3)
    assert loss.item() == pytest.approx(losses.sum() / 3, rel=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), gradient, atol=1e-6)
    bad = ops.cross_entropy(on.put(logits), on.put(np.array([1, 2, 50, 3], dtype)), reduction="none").numpy()
    assert np.isnan(bad).tolist() == [False, False, True, False]
    if dtype == np.int64:
        bad = ops.cross_entropy(on.put(logits[:1]), on.put(np.array([1 << 32], dtype)), reduction="none").numpy()
        assert np.isnan(bad).all()
    with pytest.raises(ValueError, match=r"targets must be from 0 to 49 or ignore_index = -100, got 50 at \(0,\)"):
        ops.cross_entropy(on.put(logits), np.full(4, 50, dtype))


def test_not_finite(on):
    """nan and +inf give nan; -inf is a token that cannot occur, a row of them is nan; ignored rows may hold anything."""
    x = RNG.standard_normal((6, 300), np.float32)
    x[0, 7], x[1, 299], x[2, :], x[3, 5], x[4, :] = np.nan, np.inf, -np.inf, -np.inf, np.nan
    t = Tensor(on.put(x), requires_grad=True)
    loss = ops.cross_entropy(t, np.array([1, 2, 3, 5, -100, 6]), reduction="none")
    loss.backward(on.put(np.ones(6, np.float32)))
    found, gradient = loss.data.numpy(), t.grad.numpy()
    assert np.isnan(found[:3]).all()
    assert found[3] == np.inf
    assert found[4] == 0
    assert np.isnan(gradient[:2]).any(axis=1).all()
    assert (gradient[4] == 0).all()
    np.testing.assert_allclose(gradient[5], expected(x[5:], np.array([6]), 1)[1][0], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 1), np.float32), ((2, 2, 1025), np.float32), ((2, 31), BFLOAT16), ((0, 7), np.float32)]
)
def test_log_softmax(on, shape, dtype):
    x = (5 * RNG.standard_normal(shape, np.float32)).astype(dtype)
    dy = RNG.standard_normal(shape, np.float32).astype(dtype)
    wide = x.astype(np.float64)
    exact = wide - wide.max(-1, keepdims=True, initial=-99)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    t = Tensor(on.put(x), requires_grad=True)
    y = ops.log_softmax(t)
    y.backward(on.put(dy))
    near = {"rtol": 1e-6, "atol": 2e-6} if dtype == np.float32 else {"rtol": 2**-7, "atol": 2**-7}
    np.testing.assert_allclose(y.data.numpy().astype(np.float64), exact, **near)
    wanted = dy.astype(np.float64) - np.exp(exact) * dy.astype(np.float64).sum(-1, keepdims=True)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 2**-5, "atol": 2**-5}
    np.testing.assert_allclose(t.grad.numpy().astype(np.float64), wanted, **near)
