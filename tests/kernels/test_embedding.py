from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.checkpoint import QuantizedArray
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_backward, check_forward, check_oracle

CASES = pytest.mark.parametrize("case", cases("embedding"), ids=case_id)


def call(ids, weight):
    return ops.embedding(ids, weight, np.float32)


@CASES
def test_forward(isa, case):
    check_forward("embedding", call, case)


@CASES
def test_backward(isa, case):
    check_backward("embedding", call, case)


@CASES
def test_oracle(case):
    check_oracle("embedding", case)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_exact(isa, dtype):
    """Rows are copied or widened bit for bit, whatever their bits mean."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << (8 * np.dtype(dtype).itemsize), (20, 37), np.uint64)
    weight = bits.astype(np.uint32 if dtype is np.float32 else np.uint16).view(dtype)
    ids = rng.integers(0, 20, (3, 8))
    want = weight[ids].view(np.uint32) if dtype is np.float32 else weight[ids].view(np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(ops.embedding(ids, weight).view(np.uint32), want)


def test_gradient_adds_to_the_leaf(isa, threads):
    """Twice through the same table: one buffer, the same bits on any number of threads."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 9, 500, np.int32)
    dy = rng.standard_normal((500, 300)).astype(np.float32)
    seen = []
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        table = Tensor(np.zeros((10, 300), np.float32), requires_grad=True)
        buffer = table.grad_buffer()
        ops.embedding(ids, table).backward(dy)
        ops.embedding(ids[:7], table).backward(dy[:7])
        assert table.grad is buffer
        seen.append(buffer)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    want = np.zeros((10, 300), np.float32)
    for i, d in [*zip(ids, dy, strict=True), *zip(ids[:7], dy[:7], strict=True)]:
        want[i] += d
    np.testing.assert_array_equal(seen[0], want)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_quantised(dtype):
    blocks = np.zeros((6, 34), np.uint8)  # Q8_0: a float16 scale, 32 whole numbers
    blocks[:, :2] = np.array([1.0], np.float16).view(np.uint8)
    blocks[:, 2:] = np.arange(6, dtype=np.uint8)[:, None]
    weight = QuantizedArray("Q8_0", (6, 32), blocks)
    ids = np.array([[5, 0, 2]], dtype)
    y = ops.embedding(ids, weight)
    np.testing.assert_array_equal(y, np.broadcast_to(ids[:, :, None], (1, 3, 32)))
    assert isinstance(ops.embedding(ids, Tensor(weight)), Tensor)
    assert ops.embedding(ids[:, :0], weight).shape == (1, 0, 32)
    with pytest.raises(ValueError, match=r"got 6 at ids\[0\]"):
        ops.embedding(ids[0] + dtype(1), weight)
    with pytest.raises(TypeError, match=r"\[embedding\] weight is quantised and has no gradient"):
        ops.embedding(ids, Tensor(weight, requires_grad=True))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [10, -1, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_outside(isa, dtype, bad):
    ids = np.zeros((3, 1500), dtype)
    ids[1, 7], ids[2, 1499] = bad, -2
    message = rf"\[embedding\] ids must be from 0 to 9 \(weight is \(10, 4\)\), got {bad} at ids\[1, 7\]\."
    with pytest.raises(ValueError, match=message):
        ops.embedding(ids, np.zeros((10, 4), np.float32))


def test_outside_far():
    for bad in (1 << 32, -(1 << 40), np.iinfo(np.int64).min):
        with pytest.raises(ValueError, match=rf"got {bad} at ids\[\]"):
            ops.embedding(np.array(bad), np.zeros((10, 4), np.float32))
    with pytest.raises(ValueError, match=r"ids must be from 0 to -1"):
        ops.embedding(np.array([0]), np.zeros((0, 4), np.float32))


def test_refuses():
    weight = np.zeros((10, 4), np.float32)
    with pytest.raises(TypeError, match=r"\[embedding\] ids must be int32 or int64, got float64\. Convert it"):
        ops.embedding(np.zeros(3), weight)
    with pytest.raises(TypeError, match=r"\[embedding\] ids must be a NumPy array, got list"):
        ops.embedding([1, 2], weight)
    with pytest.raises(TypeError, match=r"\[embedding\] weight must be float32, bfloat16 or a QuantizedArray, got float64"):
        ops.embedding(np.zeros(3, np.int32), weight.astype(np.float64))
    with pytest.raises(ValueError, match=r"\[embedding\] weight must be \(V, C\), got \(10,\)"):
        ops.embedding(np.zeros(3, np.int32), weight[:, 0])
