"""kl_divergence and cosine_distance: float64, central differences, torch where it is, what is not finite, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import ops
from fastlm.ops import distillation
from fastlm.tensor import Tensor


def kl64(x, t, T):
    x, t = x.astype(np.float64) / T, t.astype(np.float64) / T

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p = np.exp(log_softmax(t))
    return np.where(p > 0, p * (np.where(p > 0, log_softmax(t), 0) - log_softmax(x)), 0).sum(-1).mean() * T * T


def cos64(x, t):
    x, t = x.astype(np.float64), t.astype(np.float64)
    return (1 - (x * t).sum(-1) / np.sqrt((np.square(x).sum(-1) + 1e-12) * (np.square(t).sum(-1) + 1e-12))).mean()


def central(f, x, h=1e-5):
    g = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        d = np.zeros(x.shape)
        d[i] = h
        g[i] = (f(x + d) - f(x - d)) / (2 * h)
    return g


def values(*shape, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return tuple((scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3, 31), (5, 33), (3, 1023)])
@pytest.mark.parametrize("T", [1.0, 2.0, 0.7])
def test_kl_divergence(shape, T):
    x, t = values(*shape)
    logits = Tensor(x, requires_grad=True)
    y = ops.kl_divergence(logits, t, T)
    assert y.item() == pytest.approx(kl64(x, t, T), rel=2e-6, abs=1e-6)
    assert float(ops.kl_divergence(x, t, T)) == y.item()
    y.backward(np.array(1.5, np.float32))
    if x.size < 200:
        want = 1.5 * central(lambda z: kl64(z, t, T), x.astype(np.float64))
        assert np.abs(logits.grad - want).max() <= 1e-6 * max(1, np.abs(want).max()) + 1e-8
    assert abs(logits.grad.sum()) < 1e-5  # every row's gradient sums to zero


@pytest.mark.parametrize("shape", [(4,), (1, 1), (2, 3, 7), (5, 33)])
def test_cosine_distance(shape):
    x, t = values(*shape)
    tensor = Tensor(x, requires_grad=True)
    y = ops.cosine_distance(tensor, t)
    assert y.item() == pytest.approx(cos64(x, t), rel=1e-6, abs=1e-7)
    y.backward()
    want = central(lambda z: cos64(z, t), x.astype(np.float64))
    assert np.abs(tensor.grad - want).max() <= 1e-6 * max(1, np.abs(want).max())


def test_pieces_do_not_change_the_sum(monkeypatch):
    x, t = values(40, 50)
    a, b = Tensor(x, requires_grad=True), Tensor(x, requires_grad=True)
    whole = ops.kl_divergence(a, t, 2.0)
    monkeypatch.setattr(distillation, "_ROWS", 150)
    pieces = ops.kl_divergence(b, t, 2.0)
    assert whole.item() == pieces.item()
    for y in (whole, pieces):
        y.backward()
    assert a.grad.tobytes() == b.grad.tobytes()


def test_live():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    for V, T in ((7, 2.0), (1000, 2.0), (300, 1.0)):
        x, t = values(24, V, seed=V)
        tx = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        want = F.kl_div((tx / T).log_softmax(-1), (torch.tensor(t).double() / T).softmax(-1), reduction="batchmean") * T * T
        want = want + F.cosine_embedding_loss(tx, torch.tensor(t).double(), torch.ones(24).double())
        want.backward()
        ours = Tensor(x, requires_grad=True)
        got = ops.add(ops.kl_divergence(ours, t, T), ops.cosine_distance(ours, t))
        got.backward()
        assert got.item() == pytest.approx(want.item(), rel=2e-6)
        scale = tx.grad.abs().max().item()
        assert np.abs(ours.grad - tx.grad.numpy()).max() <= 2e-6 * scale


def test_edges():
    x = np.array([[0.0, 1.0, 2.0]], np.float32)
    assert float(ops.kl_divergence(x, x, 2.0)) == 0.0
    gone = np.array([[0.0, 1.0, -np.inf]], np.float32)
    assert float(ops.kl_divergence(x, gone)) == pytest.approx(kl64(x, np.where(np.isinf(gone), -1e9, gone), 1.0), rel=1e-6)
    assert float(ops.kl_divergence(gone, x)) == np.inf  # the teacher allows what the student rules out
    assert np.isnan(float(ops.kl_divergence(np.full((1, 3), np.nan, np.float32), x)))
    zero = Tensor(np.zeros((2, 3), np.float32), requires_grad=True)
    y = ops.cosine_distance(zero, np.ones((2, 3), np.float32))
    assert y.item() == 1.0
    y.backward()
    assert np.isfinite(zero.grad).all()


def test_refuses():
    x = np.zeros((2, 3), np.float32)
    for call, error, message in (
        (lambda: ops.kl_divergence(x, np.zeros((2, 4), np.float32)), ValueError, r"\[kl_divergence\] teacher must be"),
        (lambda: ops.kl_divergence(x, x, 0), ValueError, r"\[kl_divergence\] temperature must be greater than 0.0, got 0.0"),
        (lambda: ops.kl_divergence(x.astype(np.float64), x), TypeError, r"\[kl_divergence\] logits must be float32"),
        (
            lambda: ops.kl_divergence(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)),
            ValueError,
            "must have a row and a token",
        ),
        (lambda: ops.cosine_distance(x, x[:1]), ValueError, r"\[cosine_distance\] target must be"),
        (lambda: ops.cosine_distance(x, x.tolist()), TypeError, r"\[cosine_distance\] target must be a NumPy array"),
    ):
        with pytest.raises(error, match=message):
            call()
