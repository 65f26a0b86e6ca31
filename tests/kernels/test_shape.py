"""reshape, split, add, scale: values, views, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import ops
from fastlm.tensor import Tensor, no_grad


def randn(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_reshape():
    x = randn(2, 6)
    assert np.shares_memory(ops.reshape(x, (3, 4)), x)
    t = Tensor(x, requires_grad=True)
    y = ops.reshape(t, (2, -1, 2))
    assert y.shape == (2, 3, 2)
    dy = randn(2, 3, 2)
    y.backward(dy)
    np.testing.assert_array_equal(t.grad, dy.reshape(2, 6))
    with pytest.raises(ValueError, match=r"\[reshape\] shape must have as many elements as x, 12 in \(2, 6\), got \(5, 2\)"):
        ops.reshape(x, (5, 2))
    with pytest.raises(TypeError, match=r"\[reshape\] x must be a NumPy array or a Tensor, got list"):
        ops.reshape([1.0], (1,))


def test_split_views():
    x = randn(3, 10)
    parts = ops.split(x, (2, 0, 8))
    assert [p.shape for p in parts] == [(3, 2), (3, 0), (3, 8)]
    assert np.shares_memory(parts[2], x)
    assert parts[2].strides == x.strides
    np.testing.assert_array_equal(np.concatenate(parts, -1), x)
    for sizes in ((2, 9), (11, -1), ()):
        with pytest.raises(ValueError, match=r"\[split\] sizes must add up to the last axis of x, 10 in \(3, 10\)"):
            ops.split(x, sizes)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (2, 1, 0), (0, 1, 2), (1, 1)])
@pytest.mark.parametrize("computed", [False, True])
def test_split_gradient(used, computed):
    """Parts may be used in any order, several times or not at all; x may be a leaf or the result of an operation."""
    x = Tensor(randn(4, 9), requires_grad=True)
    parts = ops.split(ops.scale(x, 2.0) if computed else x, (3, 3, 3))
    total = None
    expected = np.zeros((4, 9), np.float32)
    for weight, i in enumerate(used, 1):
        y = ops.scale(parts[i], weight)
        total = y if total is None else ops.add(total, y)
        expected[:, 3 * i : 3 * i + 3] += weight * (2 if computed else 1)
    dy = randn(4, 3)
    total.backward(dy)
    np.testing.assert_allclose(x.grad, expected * np.tile(dy, 3), rtol=1e-6)


def test_split_then_leaf_twice():
    """The gradient adds to what a leaf already holds, and to another use of the same tensor."""
    x = Tensor(randn(2, 4), requires_grad=True)
    y = ops.add(ops.scale(x, 3.0), x)
    y.backward(np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(x.grad, np.full((2, 4), 4, np.float32))
    ops.split(x, (2, 2))[1].backward(np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(x.grad, np.tile(np.float32([4, 4, 5, 5]), (2, 1)))


@pytest.mark.parametrize("y_shape", [(2, 3, 4), (3, 4), (4,), ()])
def test_add(y_shape):
    x, y = Tensor(randn(2, 3, 4), requires_grad=True), Tensor(randn(*y_shape), requires_grad=True)
    out = ops.add(x, y)
    np.testing.assert_array_equal(out.data, x.data + y.data)
    dy = randn(2, 3, 4) + 1
    out.backward(dy)
    np.testing.assert_array_equal(x.grad, dy)
    np.testing.assert_allclose(y.grad, dy.reshape(-1, *y_shape).sum(0), rtol=1e-6)


def test_add_to_itself():
    x = Tensor(randn(3), requires_grad=True)
    ops.add(x, x).backward(np.ones(3, np.float32))
    np.testing.assert_array_equal(x.grad, np.full(3, 2, np.float32))


def test_add_refuses():
    with pytest.raises(ValueError, match=r"\[add\] y must have the shape of x, \(2, 3\), or that of its last axes, got \(2,\)"):
        ops.add(randn(2, 3), randn(2))
    with pytest.raises(ValueError, match=r"\[add\] y must have"):
        ops.add(randn(3), randn(2, 3))
    with pytest.raises(ValueError, match=r"\[add\] y must have"):
        ops.add(randn(2, 3), randn(1, 3))
    with pytest.raises(TypeError, match=r"\[add\] y must be float32, got float64\. Convert it with y\.astype\('float32'\)\."):
        ops.add(randn(3), np.zeros(3))


def test_scale():
    x = Tensor(randn(3, 5), requires_grad=True)
    y = ops.scale(x, 0.5)
    np.testing.assert_array_equal(y.data, x.data * np.float32(0.5))
    y.backward(np.ones((3, 5), np.float32))
    np.testing.assert_array_equal(x.grad, np.full((3, 5), 0.5, np.float32))
    with pytest.raises(TypeError, match=r"\[scale\] factor must be a number, got str"):
        ops.scale(x, "two")


def test_not_recorded():
    x = Tensor(randn(2, 4), requires_grad=True)
    with no_grad():
        outs = [ops.reshape(x, (8,)), *ops.split(x, (1, 3)), ops.add(x, x), ops.scale(x, 2.0)]
    assert all(isinstance(y, Tensor) and not y.requires_grad for y in outs)
    plain = [ops.reshape(x.data, (8,)), *ops.split(x.data, (1, 3)), ops.add(x.data, x.data), ops.scale(x.data, 2.0)]
    assert all(type(y) is np.ndarray for y in plain)


def test_leaves_share_no_gradient():
    """A leaf may keep the array that a backward rule made, but none that anyone else holds."""
    x, r, w = (Tensor(a, requires_grad=True) for a in (randn(2, 8), randn(2, 8) + 1, randn(8)))
    normed, total = ops.add_rms_norm(x, r, w)
    dy = randn(2, 8)
    ops.add(normed, total).backward(dy)
    assert not np.shares_memory(x.grad, r.grad)
    np.testing.assert_array_equal(x.grad, r.grad)
    before, given = r.grad.copy(), dy.copy()
    ops.add(x, total.data).backward(dy)
    assert not np.shares_memory(x.grad, dy)
    np.testing.assert_array_equal(x.grad, before + dy)
    np.testing.assert_array_equal(r.grad, before)
    z = Tensor(randn(2, 8), requires_grad=True)
    ops.add(z, x.data).backward(dy)
    assert not np.shares_memory(z.grad, dy)
    ops.scale(z, 2.0).backward(dy)
    np.testing.assert_array_equal(z.grad, 3 * dy)
    np.testing.assert_array_equal(dy, given)


def test_leaf_and_its_views():
    """A leaf used as it is, reshaped, and through a sum of two uses."""
    x = Tensor(randn(2, 8), requires_grad=True)
    y = ops.scale(x, 2.0)
    z = ops.add(ops.add(y, y), ops.reshape(ops.reshape(x, (16,)), (2, 8)))
    dy = randn(2, 8)
    z.backward(dy)
    np.testing.assert_allclose(x.grad, 5 * dy, rtol=1e-6)
