from __future__ import annotations

import math

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle, oracle

CASES = pytest.mark.parametrize("case", cases("activation"), ids=case_id)
KINDS = pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "relu"])


@CASES
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_forward(isa, case):
    check_forward("activation", ops.activation, case)


@CASES
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_backward(isa, case):
    check_backward("activation", ops.activation, case)


@pytest.mark.parametrize("case", [c for c in cases("activation") if c["kind"] != "relu"], ids=case_id)
def test_oracle(case):
    check_oracle("activation", case)


@KINDS
def test_far_out(isa, kind):
    """Large and infinite arguments: x or 0, slope 1 or 0, never nan; only -inf * 0 is nan, as the formula says."""
    x = np.array([50, 1e5, 1e19, 3e38, np.inf, -50, -89, -1e3, -1e19, -3e38], np.float32)
    y = ops.activation(x, kind)
    np.testing.assert_array_equal(y[:5], x[:5])
    np.testing.assert_allclose(y[5:], 0, atol=1e-20)
    t = Tensor(x, requires_grad=True)
    ops.activation(t, kind).backward(np.ones_like(x))
    np.testing.assert_array_equal(t.grad[:4], 1)
    np.testing.assert_allclose(t.grad[5:], 0, atol=1e-20)
    assert np.isnan(ops.activation(np.array([np.nan] * 5, np.float32), kind)).all()


def test_gelu_tail(isa):
    """Where 1 + erf(x / sqrt 2) would cancel, gelu keeps its relative precision."""
    x = np.linspace(-8, -1, 4001, dtype=np.float32)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    np.testing.assert_allclose(ops.activation(x, "gelu"), exact, rtol=2e-5)


@KINDS
def test_bits(isa, kind, threads):
    """The same bits on any number of threads and at any place in the array."""
    x = np.random.default_rng(0).standard_normal(40001).astype(np.float32)
    y = ops.activation(x, kind)
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(ops.activation(x, kind), y)
    for begin, end in ((1, 40001), (7, 8), (17, 40), (8191, 8194)):
        np.testing.assert_array_equal(ops.activation(x[begin:end], kind), y[begin:end])


def test_strided_input():
    x = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)[:, ::2]
    np.testing.assert_array_equal(ops.activation(x, "relu"), oracle("activation").forward(x, "relu"))


def test_refuses():
    with pytest.raises(ValueError, match=r"\[activation\] kind must be one of 'gelu', 'gelu_tanh', 'silu', 'relu', got 'swish'"):
        ops.activation(np.zeros(3, np.float32), "swish")
    with pytest.raises(ValueError, match=r"\[activation\] kind must be one of .*, got \[\]"):
        ops.activation(np.zeros(3, np.float32), [])
    with pytest.raises(TypeError, match=r"\[activation\] x must be float32, got int64"):
        ops.activation(np.zeros(3, np.int64), "gelu")
