from __future__ import annotations

import numpy as np
import pytest

from fastlm import backend, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("cross_entropy"), ids=case_id)


@CASES
def test_forward(isa, case):
    check_forward("cross_entropy", ops.cross_entropy, case)


@CASES
def test_backward(isa, case):
    check_backward("cross_entropy", ops.cross_entropy, case)


@pytest.mark.parametrize(
    "case", [c for c in cases("cross_entropy") if not c.get("masked") and np.prod(c["shape"]) < 1e6], ids=case_id
)
def test_oracle(case):
    check_oracle("cross_entropy", case)


def test_known():
    """Uniform logits cost log V; the gradient is 1 / V, less 1 at the target."""
    x = Tensor(np.full((1, 8), 2.5, np.float32), requires_grad=True)
    loss = ops.cross_entropy(x, np.array([3]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(np.log(8), rel=1e-7)
    loss.backward()
    np.testing.assert_allclose(x.grad, 0.125 - (np.arange(8) == 3)[None], rtol=1e-6)


def test_one_row_without_axes():
    """logits (V,), a target (): the loss of each row is (), in either type of integer."""
    x = np.random.default_rng(0).standard_normal(33).astype(np.float32)
    want = ops.cross_entropy(x[None], np.array([5]), reduction="none")
    for target in (np.array(5), np.array(5, np.int32)):
        t = Tensor(x, requires_grad=True)
        loss = ops.cross_entropy(t, target, reduction="none")
        assert loss.shape == ()
        np.testing.assert_array_equal(loss.data, want[0])
        loss.backward()
        assert t.grad.shape == (33,)


def test_ignored_rows_are_untouched_by_what_they_hold(isa):
    x = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)
    x[1] = np.nan
    t = Tensor(x, requires_grad=True)
    loss = ops.cross_entropy(t, np.array([1, -100, 3, 4]))
    loss.backward()
    assert np.isfinite(loss.item())
    assert (t.grad[1] == 0).all()
    assert (t.grad[0] != 0).all()


def test_all_ignored_is_zero():
    x = Tensor(np.ones((3, 5), np.float32), requires_grad=True)
    loss = ops.cross_entropy(x, np.full(3, -100))
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("at", [0, 5, 1024, 1030])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(isa, bad, at):
    """A row with nan or +inf is nan, loss and gradient; its neighbours are untouched."""
    x = np.random.default_rng(0).standard_normal((3, 1031)).astype(np.float32)
    clean = ops.cross_entropy(x, np.array([1, 2, 3]), reduction="none")
    x[1, at] = bad
    t = Tensor(x, requires_grad=True)
    loss = ops.cross_entropy(t, np.array([1, 2, 3]), reduction="none")
    loss.backward(np.ones(3, np.float32))
    assert np.isnan(loss.data[1])
    assert np.isnan(t.grad[1]).any()
    assert np.isfinite(t.grad[[0, 2]]).all()
    np.testing.assert_array_equal(loss.data[[0, 2]], clean[[0, 2]])


def test_minus_infinity(isa):
    """A target of probability 0 costs +inf, a row that is all -inf is nan, blocks of -inf before the first number add nothing."""
    x = np.full((3, 4096), -np.inf, np.float32)
    x[0, :2] = x[1, 3000:3002] = 0
    loss = ops.cross_entropy(x, np.array([5, 3001, 0]), reduction="none")
    assert loss[0] == np.inf
    assert loss[1] == pytest.approx(np.log(2))
    assert np.isnan(loss[2])


@pytest.mark.parametrize("rows", [1, 2000])  # 2000: large enough for streamed stores
def test_gradient_over_blocks_of_any_height(isa, rows):
    """Blocks of -inf before the first number, and maxima that rise by more than float32's exponents can hold."""
    row = np.full(3000, -np.inf, np.float32)
    row[1100], row[1500], row[2100:2104] = -400, -399, [-250, -250.5, -249, -260]
    x = Tensor(np.tile(row, (rows, 1)), requires_grad=True)
    ops.cross_entropy(x, np.full(rows, 2102), reduction="sum").backward()
    wide = np.exp(row.astype(np.float64) + 249)
    expected = wide / wide.sum() - (np.arange(3000) == 2102)
    np.testing.assert_allclose(x.grad[-1], expected.astype(np.float32), rtol=1e-6)
    np.testing.assert_array_equal(x.grad, np.tile(x.grad[:1], (rows, 1)))


def test_scaled_gradient():
    """backward(dy) is dy times backward()."""
    x = np.random.default_rng(1).standard_normal((5, 77)).astype(np.float32)
    grads = []
    for dy in (1.0, 0.5):
        t = Tensor(x, requires_grad=True)
        ops.cross_entropy(t, np.arange(5)).backward(np.array(dy, np.float32))
        grads.append(t.grad)
    np.testing.assert_array_equal(grads[0] * np.float32(0.5), grads[1])


def test_bits_over_threads_and_batch(threads):
    rng = np.random.default_rng(2)
    x, targets = rng.standard_normal((100, 3001)).astype(np.float32), rng.integers(0, 3001, 100).astype(np.int32)
    results = []
    for n in (1, 2, 3):
        backend.set_num_threads(n)
        t = Tensor(x, requires_grad=True)
        loss = ops.cross_entropy(t, targets, reduction="sum")
        loss.backward()
        results.append((loss.data.tobytes(), t.grad.tobytes()))
    assert results[0] == results[1] == results[2]
    rows = ops.cross_entropy(x, targets, reduction="none")
    np.testing.assert_array_equal(rows[40:41], ops.cross_entropy(x[40:41], targets[40:41], reduction="none"))


@pytest.mark.parametrize("shape", [(3, 1), (2, 31), (2, 2, 1025), (0, 7)])
def test_log_softmax(isa, shape):
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32) * 5
    y = ops.log_softmax(x)
    wide = x.astype(np.float64)
    most = wide.max(axis=-1, keepdims=True)
    exact = wide - most - np.log(np.exp(wide - most).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(y, exact, rtol=3e-7, atol=1e-6)
    t = Tensor(x, requires_grad=True)
    dy = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    ops.log_softmax(t).backward(dy)
    np.testing.assert_allclose(t.grad, dy - np.exp(exact) * dy.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-5)


def test_refuses():
    x = np.zeros((4, 10), np.float32)
    with pytest.raises(
        ValueError, match=r"\[cross_entropy\] targets must be from 0 to 9 or ignore_index = -100, got 10 at \(2,\)\."
    ):
        ops.cross_entropy(x, np.array([0, 1, 10, -7]))
    with pytest.raises(
        ValueError, match=r"\[cross_entropy\] targets must be \(\.\.\.\) = \(4,\), got \(3,\)\. logits is \(4, 10\)\."
    ):
        ops.cross_entropy(x, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, none, got 'max'\."):
        ops.cross_entropy(x, np.zeros(4, np.int64), reduction="max")
    with pytest.raises(TypeError, match=r"targets must be a NumPy array of int32 or int64, got float64"):
        ops.cross_entropy(x, np.zeros(4))
    with pytest.raises(ValueError, match=r"targets must be from 0 to -1"):
        ops.cross_entropy(np.zeros((1, 0), np.float32), np.zeros(1, np.int64))
