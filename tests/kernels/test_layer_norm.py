from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("layer_norm"), ids=case_id)


EMPTY = pytest.mark.filterwarnings("ignore:(Mean of empty|invalid value):RuntimeWarning")


def call(x, weight, bias, eps, residual=None):
    return ops.layer_norm(x, weight, bias, eps) if residual is None else ops.add_layer_norm(x, residual, weight, bias, eps)


@EMPTY
@CASES
def test_forward(isa, case):
    check_forward("layer_norm", call, case)


@EMPTY
@CASES
def test_backward(isa, case):
    check_backward("layer_norm", call, case)


@EMPTY
@CASES
def test_oracle(case):
    check_oracle("layer_norm", case)


def test_not_finite(isa):
    """A row with inf or nan is nan; its neighbours are untouched."""
    x = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)
    w = np.ones(33, np.float32)
    clean = ops.layer_norm(x, w)
    x[1, 5], x[2, 32] = np.inf, np.nan
    y = ops.layer_norm(x, w)
    assert np.isnan(y[1:3]).all()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("used", ["normed", "total"])
def test_one_output_used(used):
    """Either output alone gives gradients."""
    rng = np.random.default_rng(1)
    x, r = (Tensor(rng.standard_normal((3, 40)).astype(np.float32), requires_grad=True) for _ in range(2))
    w, b = (Tensor(rng.standard_normal(40).astype(np.float32), requires_grad=True) for _ in range(2))
    dy = rng.standard_normal((3, 40)).astype(np.float32)
    normed, total = ops.add_layer_norm(x, r, w, b)
    (normed if used == "normed" else total).backward(dy)
    if used == "total":
        np.testing.assert_array_equal(x.grad, dy)
        np.testing.assert_array_equal(r.grad, dy)
        assert w.grad is None
        return
    x2, w2, b2 = (Tensor(a, requires_grad=True) for a in (x.data + r.data, w.data, b.data))
    ops.layer_norm(x2, w2, b2).backward(dy)
    for got, want in ((x, x2), (r, x2), (w, w2), (b, b2)):
        np.testing.assert_array_equal(got.grad, want.grad)


def test_bits(isa, threads):
    """The same bits on any number of threads, alone and in a batch, recorded or not."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, 129)).astype(np.float32)
    w, b = (rng.standard_normal(129).astype(np.float32) for _ in range(2))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    seen = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        xt, wt, bt = (Tensor(a, requires_grad=True) for a in (x, w, b))
        y = ops.layer_norm(xt, wt, bt)
        y.backward(dy)
        seen.append((ops.layer_norm(x, w, b), y.data, xt.grad, wt.grad, bt.grad))
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(seen[0][0], seen[0][1])
    np.testing.assert_array_equal(seen[0][0][77:78], ops.layer_norm(x[77:78], w, b))


def test_large(isa):
    """Outputs that go past the caches have the bits of their rows a few at a time: fresh, or in the place of a gradient."""
    rng = np.random.default_rng(7)
    R, C = (1 << 22) // 1024 + 64, 1024
    x, dy = rng.standard_normal((R, C), np.float32), rng.standard_normal((R, C), np.float32)
    weight, bias = rng.standard_normal(C, np.float32), rng.standard_normal(C, np.float32)
    few = slice(R - 70, R)
    for b in (bias, None):
        np.testing.assert_array_equal(ops.layer_norm(x, weight, b)[few], ops.layer_norm(x[few], weight, b))
        stats, y, dx = np.empty((R, 3), np.float32), np.empty((R, C), np.float32), backend.empty((R, C))
        _C.layer_norm_forward(y, None, stats, x, None, weight, b, 1e-5)
        small = np.empty((70, C), np.float32)
        _C.layer_norm_backward(small, None, None, None, dy[few], None, x[few], weight, stats[few])
        _C.layer_norm_backward(dx, None, None, None, dy, None, x, weight, stats)
        np.testing.assert_array_equal(dx[few], small)
        dx[...] = dy
        _C.layer_norm_backward(dx, None, None, None, dx, None, x, weight, stats)
        np.testing.assert_array_equal(dx[few], small)
        summed = small + dy[few]
        _C.layer_norm_backward(dx, None, None, None, dy, dy, x, weight, stats)
        np.testing.assert_array_equal(dx[few], summed)


def test_constant_row(isa):
    """A variance of zero, which rounding must not make negative: the output is the bias."""
    for value in (0.0, 0.1, 100.1, -1e-20, 1e18):
        x = np.full((2, 777), value, np.float32)
        y = ops.layer_norm(x, np.ones(777, np.float32), np.full(777, 3, np.float32))
        np.testing.assert_allclose(y, 3, atol=1e-3)


@pytest.mark.parametrize("trainable", [(True, False, False), (False, True, False), (False, False, True)])
def test_some_gradients(trainable):
    """Each gradient alone is the same as with the others."""
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((5, 20), (20,), (20,))]
    dy = rng.standard_normal((5, 20)).astype(np.float32)
    full = [Tensor(a, requires_grad=True) for a in arrays]
    ops.layer_norm(*full).backward(dy)
    some = [Tensor(a, requires_grad=t) for a, t in zip(arrays, trainable, strict=True)]
    ops.layer_norm(*some).backward(dy)
    for f, s, t in zip(full, some, trainable, strict=True):
        if t:
            np.testing.assert_array_equal(s.grad, f.grad)
        else:
            assert s.grad is None


def test_refuses():
    x = np.zeros((4, 128, 768), np.float32)
    message = r"\[layer_norm\] weight must be \(C,\) = \(768,\), got \(1024,\)\. x is \(4, 128, 768\)\."
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(x, np.zeros(1024, np.float32))
    message = r"\[layer_norm\] x must be float32, got float64\. Convert it with x\.astype\('float32'\)\."
    with pytest.raises(TypeError, match=message):
        ops.layer_norm(x.astype(np.float64), np.zeros(768, np.float32))
    with pytest.raises(ValueError, match=r"\[add_layer_norm\] residual must be the shape of x = \(4, 128, 768\), got \(128, 768\)"):
        ops.add_layer_norm(x, x[0], np.zeros(768, np.float32))


def test_a_large_gradient_past_the_caches(isa):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 5500, 768), np.float32)
    weight, bias = rng.standard_normal((2, 768), np.float32)

    def gradient(rows):
        t = Tensor(x[rows].copy(), True)
        ops.layer_norm(t, weight, bias, 1e-5).backward(dy[rows].copy())
        return t.grad

    parts = np.concatenate([gradient(slice(i, i + 1100)) for i in range(0, 5500, 1100)])
    np.testing.assert_array_equal(gradient(slice(None)), parts)


def test_large_sums_over_rows(isa, threads):
    """Gradients of weight and bias have the bits of the pieces of 32 rows, added in order; the last piece has an odd number of rows."""
    rng = np.random.default_rng(1)
    R, C = 5501, 768
    x, dy = rng.standard_normal((2, R, C), np.float32)
    weight, bias = rng.standard_normal((2, C), np.float32)

    def gradients(rows):
        w, b = Tensor(weight, requires_grad=True), Tensor(bias, requires_grad=True)
        ops.layer_norm(x[rows], w, b).backward(dy[rows])
        return w.grad, b.grad

    sums = np.zeros((2, C), np.float32)
    for at in range(0, R, _C.layer_norm_rows):
        sums += gradients(slice(at, at + _C.layer_norm_rows))
    for n in (1, 2):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(gradients(slice(None)), sums)
