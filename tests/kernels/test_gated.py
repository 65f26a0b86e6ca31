from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("gated"), ids=case_id)


def randn(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@CASES
def test_forward(isa, case):
    check_forward("gated", ops.gated, case)


@CASES
def test_backward(isa, case):
    check_backward("gated", ops.gated, case)


@pytest.mark.parametrize("case", [c for c in cases("gated") if c["kind"] != "relu"], ids=case_id)
def test_oracle(case):
    check_oracle("gated", case)


def test_gradient_of_split():
    """Both halves of one array: the gradient is written into one array, which reaches x without a copy."""
    x = Tensor(randn(3, 4, 66), requires_grad=True)
    seen = []
    gate, up = ops.split(x, (33, 33))
    y = ops.gated(gate, up, "silu")
    inner = gate._node.backward
    gate._node.backward = lambda dy: (seen.append(dy), inner(dy))[1]
    dy = randn(3, 4, 33)
    y.backward(dy)
    assert seen[0].base is not None
    assert seen[0].base.shape == x.shape
    g, u = (Tensor(np.ascontiguousarray(part), requires_grad=True) for part in np.split(x.data, 2, -1))
    ops.gated(g, u, "silu").backward(dy)
    np.testing.assert_array_equal(x.grad, np.concatenate([g.grad, u.grad], -1))


def test_halves_in_other_order():
    x = Tensor(randn(3, 20), requires_grad=True)
    up, gate = ops.split(x, (10, 10))
    dy = randn(3, 10)
    ops.gated(gate, up, "gelu").backward(dy)
    g, u = Tensor(x.data[:, 10:].copy(), requires_grad=True), Tensor(x.data[:, :10].copy(), requires_grad=True)
    ops.gated(g, u, "gelu").backward(dy)
    np.testing.assert_array_equal(x.grad, np.concatenate([u.grad, g.grad], -1))


@pytest.mark.parametrize(
    "views",
    [
        lambda a: a[:, ::2],
        lambda a: a[..., ::2],
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: a[:, :1],
        lambda a: a[0][:, None],
    ],
)
def test_any_strides(views):
    a, b = randn(4, 6, 8), randn(4, 6, 8)[::-1]
    want = ops.gated(views(a).copy(), views(b).copy(), "silu")
    np.testing.assert_array_equal(ops.gated(views(a), views(b), "silu"), want)


def test_bits(isa, threads):
    """The same bits on any number of threads, alone and in a batch."""
    gate, up = randn(9, 5001), randn(9, 5001) + 1
    y = ops.gated(gate, up, "silu")
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.gated(gate, up, "silu"), y)
    np.testing.assert_array_equal(ops.gated(gate[4:5], up[4:5], "silu"), y[4:5])


def test_refuses():
    with pytest.raises(ValueError, match=r"\[gated\] up must be the shape of gate = \(2, 3\), got \(2, 4\)"):
        ops.gated(randn(2, 3), randn(2, 4), "silu")
    with pytest.raises(TypeError, match=r"\[gated\] up must be float32, got float64"):
        ops.gated(randn(2, 3), np.zeros((2, 3)), "silu")
    with pytest.raises(ValueError, match=r"\[gated\] kind must be one of 'gelu', 'gelu_tanh', 'silu', 'relu', got None"):
        ops.gated(randn(2, 3), randn(2, 3), None)
