from __future__ import annotations

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("distance_bias"), ids=case_id)
TRAINED = pytest.mark.parametrize("case", [c for c in cases("distance_bias") if not c.get("bfloat16")], ids=case_id)


@CASES
def test_forward(isa, case):
    check_forward("distance_bias", ops.distance_bias, case)


@TRAINED
def test_backward(isa, case):
    check_backward("distance_bias", ops.distance_bias, case)


@TRAINED
def test_oracle(case):
    check_oracle("distance_bias", case)


def test_positions_of_one_row(isa):
    """(T,) is one row for every sequence; any number is a position."""
    rng = np.random.default_rng(0)
    weight, buckets = rng.standard_normal((4, 3)).astype(np.float32), np.array([3, 1, 0, 2, 1], np.int32)
    positions = np.array([0, 5, np.iinfo(np.int32).max, np.iinfo(np.int32).min, -3], np.int32)
    y = ops.distance_bias(buckets, weight, positions, 9, 2)
    assert y.shape == (1, 3, 5, 9)
    np.testing.assert_array_equal(y, ops.distance_bias(buckets, weight, positions[None], 9, 2))
    np.testing.assert_array_equal(y[0, :, 2], np.repeat(weight[3][:, None], 9, axis=1))
    np.testing.assert_array_equal(y[0, :, 3], np.repeat(weight[1][:, None], 9, axis=1))


def test_bits(isa, threads):
    """The gradient adds to the leaf, with the same bits on any number of threads."""
    rng = np.random.default_rng(1)
    weight, buckets = rng.standard_normal((16, 7)).astype(np.float32), rng.integers(0, 16, 81, np.int32)
    positions, dy = np.arange(300, dtype=np.int32), rng.standard_normal((1, 7, 300, 300)).astype(np.float32)
    found = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        table = Tensor(weight, requires_grad=True)
        y = ops.distance_bias(buckets, table, positions, 300, 40)
        y.backward(dy)
        ops.distance_bias(buckets, table, positions, 300, 40).backward(dy)
        found.append((y.data, table.grad))
    for y, gradient in found[1:]:
        np.testing.assert_array_equal(y, found[0][0])
        np.testing.assert_array_equal(gradient, found[0][1])


def test_refuses():
    weight, at = np.zeros((5, 2), np.float32), np.zeros(3, np.int32)
    buckets = np.array([0, 4, 1], np.int32)
    with pytest.raises(ValueError, match=r"\[distance_bias\] buckets must be from 0 to 4, got 0 to 5\."):
        ops.distance_bias(buckets + np.int32([0, 1, 0]), weight, at, 4, 1)
    with pytest.raises(ValueError, match=r"\[distance_bias\] center must be from 0 to 2, got 3\. buckets is \(3,\)\."):
        ops.distance_bias(buckets, weight, at, 4, 3)
    with pytest.raises(ValueError, match=r"\[distance_bias\] weight must be \(N, H\), got \(5,\)\."):
        ops.distance_bias(buckets, weight[:, 0], at, 4, 1)
    with pytest.raises(TypeError, match=r"\[distance_bias\] weight must be float32 or bfloat16, got float64\."):
        ops.distance_bias(buckets, weight.astype(float), at, 4, 1)
    with pytest.raises(TypeError, match=r"\[distance_bias\] positions must be int32, got int64\."):
        ops.distance_bias(buckets, weight, at.astype(np.int64), 4, 1)
    with pytest.raises(ValueError, match=r"\[distance_bias\] positions must be \(T,\) or \(B, T\), got \(1, 1, 3\)\."):
        ops.distance_bias(buckets, weight, at[None, None], 4, 1)
