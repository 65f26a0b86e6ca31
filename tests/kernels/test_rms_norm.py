from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("rms_norm"), ids=case_id)


def call(x, weight, eps, residual=None):
    return ops.rms_norm(x, weight, eps) if residual is None else ops.add_rms_norm(x, residual, weight, eps)


@CASES
@pytest.mark.filterwarnings("ignore:(Mean of empty|invalid value):RuntimeWarning")
def test_forward(isa, case):
    check_forward("rms_norm", call, case)


@CASES
@pytest.mark.filterwarnings("ignore:(Mean of empty|invalid value):RuntimeWarning")
def test_backward(isa, case):
    check_backward("rms_norm", call, case)


@CASES
@pytest.mark.filterwarnings("ignore:(Mean of empty|invalid value):RuntimeWarning")
def test_oracle(case):
    check_oracle("rms_norm", case)


def test_not_finite(isa):
    """A row with nan is nan, one with inf is zeros and a nan; their neighbours are untouched."""
    x = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)
    w = np.ones(33, np.float32)
    clean = ops.rms_norm(x, w)
    x[1, 5], x[2, 32] = np.inf, np.nan
    y = ops.rms_norm(x, w)
    assert np.isnan(y[2]).all()
    assert np.isnan(y[1, 5])
    assert (np.delete(y[1], 5) == 0).all()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("used", ["normed", "total"])
def test_one_output_used(used):
    """Either output alone gives gradients."""
    rng = np.random.default_rng(1)
    x, r = (Tensor(rng.standard_normal((3, 40)).astype(np.float32), requires_grad=True) for _ in range(2))
    w = Tensor(rng.standard_normal(40).astype(np.float32), requires_grad=True)
    dy = rng.standard_normal((3, 40)).astype(np.float32)
    normed, total = ops.add_rms_norm(x, r, w)
    (normed if used == "normed" else total).backward(dy)
    if used == "total":
        np.testing.assert_array_equal(x.grad, dy)
        np.testing.assert_array_equal(r.grad, dy)
        assert w.grad is None
        return
    x2, w2 = Tensor(x.data + r.data, requires_grad=True), Tensor(w.data, requires_grad=True)
    ops.rms_norm(x2, w2).backward(dy)
    for got, want in ((x, x2), (r, x2), (w, w2)):
        np.testing.assert_array_equal(got.grad, want.grad)


def test_bits(isa, threads):
    """The same bits on any number of threads, alone and in a batch, recorded or not."""
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((200, 129)).astype(np.float32), rng.standard_normal(129).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    seen = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        xt, wt = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
        y = ops.rms_norm(xt, wt)
        y.backward(dy)
        seen.append((ops.rms_norm(x, w), y.data, xt.grad, wt.grad))
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(seen[0][0], seen[0][1])
    np.testing.assert_array_equal(seen[0][0][77:78], ops.rms_norm(x[77:78], w))


def test_refuses():
    x = np.zeros((4, 12, 64), np.float32)
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight must be \(C,\) = \(64,\), got \(65,\)\. x is \(4, 12, 64\)\."):
        ops.rms_norm(x, np.zeros(65, np.float32))
    with pytest.raises(TypeError, match=r"\[rms_norm\] weight must be float32, got float16\. Convert it"):
        ops.rms_norm(x, np.zeros(64, np.float16))
    with pytest.raises(ValueError, match=r"\[rms_norm\] x must have at least 1 axes, got shape \(\)"):
        ops.rms_norm(np.ones((), np.float32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"\[add_rms_norm\] residual must be the shape of x = \(4, 12, 64\), got \(12, 64\)"):
        ops.add_rms_norm(x, x[0], np.zeros(64, np.float32))
    with pytest.raises(ValueError, match=r"\[rms_norm\] eps must be from 0\.0 to inf, got -1\.0"):
        ops.rms_norm(x, np.zeros(64, np.float32), eps=-1)


@pytest.mark.parametrize("C", [768, 771])
def test_large(isa, C):
    """Gradients that go past the caches have the bits of their rows a few at a time: fresh, in the place of a gradient, added to one."""
    rng = np.random.default_rng(1)
    R = (1 << 22) // C + 40
    x, dy = rng.standard_normal((2, R, C), np.float32)
    weight, rstd = rng.standard_normal(C, np.float32), rng.uniform(0.5, 2, R).astype(np.float32)
    few, small, dx = slice(R - 35, R), np.empty((35, C), np.float32), backend.empty((R, C))
    _C.rms_norm_backward(small, None, None, dy[few], None, x[few], weight, rstd[few])
    _C.rms_norm_backward(dx, None, None, dy, None, x, weight, rstd)
    np.testing.assert_array_equal(dx[few], small)
    dx[...] = dy
    _C.rms_norm_backward(dx, None, None, dx, None, x, weight, rstd)
    np.testing.assert_array_equal(dx[few], small)
    _C.rms_norm_backward(dx, None, None, dy, dy, x, weight, rstd)
    np.testing.assert_array_equal(dx[few], small + dy[few])


def test_large_sums_over_rows(isa, threads):
    """The gradient of the weight has the bits of the pieces of 32 rows, added in order; the last piece has an odd number of rows."""
    rng = np.random.default_rng(1)
    R, C = 5501, 768
    x, dy = rng.standard_normal((2, R, C), np.float32)
    weight = rng.standard_normal(C, np.float32)

    def gradient(rows):
        w = Tensor(weight, requires_grad=True)
        ops.rms_norm(x[rows], w).backward(dy[rows])
        return w.grad

    total = np.zeros(C, np.float32)
    for at in range(0, R, _C.rms_norm_rows):
        total += gradient(slice(at, at + _C.rms_norm_rows))
    for n in (1, 2):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(gradient(slice(None)), total)
