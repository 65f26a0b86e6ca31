from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.checkpoint import lossless
from fastlm.checkpoint.quantized import QuantizedArray, quantize
from fastlm.kernels.lossless_matmul import lossless_matmul_ref as ref
from fastlm.kernels.matmul.matmul_ref import bound
from fastlm.tensor import Tensor
from fastlm.testing import case_id, cases, check_oracle, rng

CASES = pytest.mark.parametrize("case", cases("lossless_matmul"), ids=case_id)
EVERY = pytest.mark.parametrize("dtype", ref.DTYPES)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


@CASES
def test_forward(isa, case):
    """Against the oracle within the bound of a chain, and bit for bit what the weight as it was gives."""
    inputs = ref.inputs(case, rng(case))
    x, w = inputs["x"], inputs["weight"].dequantize()
    y = ops.linear(**inputs)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.all(np.abs(y - exact) <= bound(x, w.T) + np.spacing(np.abs(exact).astype(np.float32)))
    np.testing.assert_array_equal(bits(y), bits(ops.linear(x, w)))


@CASES
def test_backward(isa, case):
    generator = rng(case)
    inputs = ref.inputs(case, generator)
    x = Tensor(inputs["x"], requires_grad=True)
    y = ops.linear(x, inputs["weight"])
    dy = generator.standard_normal(y.shape).astype(np.float32)
    y.backward(dy)
    np.testing.assert_array_equal(x.grad, ops.matmul(dy, inputs["weight"].dequantize()))


@pytest.mark.parametrize("case", [c for c in cases("lossless_matmul") if c["rows"] <= 2], ids=case_id)
def test_oracle(case):
    check_oracle("lossless_matmul", case)


@EVERY
def test_every_bit_comes_back(isa, dtype):
    """Exceptions, zeros of both signs, subnormal numbers, inf and nan with their payloads; on every instruction set one layout."""
    g = np.random.default_rng(0)
    for shape in ((1, 1), (31, 33), (33, 8), (64, 1023), (130, 257), (0, 7), (7, 0)):
        w = ref.random_weight(dtype, shape, g)
        if w.size > 1000:
            word = np.uint32 if dtype == "float32" else np.uint16
            w.view(word).flat[:7] = np.array(
                [0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFFFFFFF, 0x00012345], np.uint64
            ) >> (0 if dtype == "float32" else 16)
        q = quantize(w, "LOSSLESS")
        assert q.shape == shape
        assert q.dtype == q.kind == "LOSSLESS"
        assert q.value_bytes == w.dtype.itemsize
        assert q.plain().dtype == w.dtype
        np.testing.assert_array_equal(bits(q.plain()), bits(w))
        np.testing.assert_array_equal(bits(q.dequantize()), bits(w.astype(np.float32)))
        ids = g.integers(0, max(shape[0], 1), (3, 2)) if shape[0] else np.zeros((0, 2), int)
        np.testing.assert_array_equal(bits(q.dequantize_rows(ids)), bits(w[ids].astype(np.float32)))
        np.testing.assert_array_equal(bits(ops.embedding(ids.astype(np.int32), q)), bits(w[ids].astype(np.float32)))
        _C.set_isa("scalar")
        np.testing.assert_array_equal(quantize(w, "LOSSLESS").blocks, q.blocks)
        _C.set_isa(isa)


@EVERY
def test_exceptions_alone_and_in_batch(isa, threads, dtype):
    """Rows, alone and in batches on any number of threads, with one weight in a hundred an exception; side by side too."""
    g = np.random.default_rng(1)
    w = ref.random_weight(dtype, (300, 1029), g)
    w[np.abs(w.astype(np.float32)) > 1e10] = 1e10  # finite sums
    other, x = ref.random_weight(dtype, (65, 1029), g), g.standard_normal((40, 1029), np.float32)
    other[np.abs(other.astype(np.float32)) > 1e10] = 0
    q, p = quantize(w, "LOSSLESS"), quantize(other, "LOSSLESS")
    whole = ops.linear(x, w)
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        for M in (*range(1, 10), 13, 40):
            np.testing.assert_array_equal(bits(ops.linear(x[:M], q)), bits(whole[:M]))
            first, second = ops.linears(x[:M], (q, p))
            np.testing.assert_array_equal(bits(first), bits(whole[:M]))
            np.testing.assert_array_equal(bits(second), bits(ops.linear(x[:M], other)))


@EVERY
def test_epilogue_and_gradient(isa, dtype):
    g = np.random.default_rng(2)
    weight = quantize(ref.random_weight(dtype, (70, 96), g).clip(-1, 1), "LOSSLESS")
    arrays = [g.standard_normal(s).astype(np.float32) for s in [(2, 3, 96), (70,), (2, 3, 70)]]
    dy = g.standard_normal((2, 3, 70)).astype(np.float32)
    got, want = [], []
    for w, out in ((weight, got), (weight.dequantize(), want)):
        x, b, r = (Tensor(a, requires_grad=True) for a in arrays)
        y = ops.linear(x, w, b, "gelu", r)
        y.backward(dy)
        out += [y.data, x.grad, b.grad, r.grad]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@EVERY
def test_size(dtype):
    """A matrix as they are trained: 7/8 and 3/4 of its bytes, and a hundredth for what is listed."""
    w = (0.02 * np.random.default_rng(3).standard_normal((1024, 768), np.float32)).astype(ref.DTYPES[dtype])
    share = quantize(w, "LOSSLESS").nbytes / w.nbytes
    assert share < (0.885 if dtype == "float32" else 0.765)


def test_refuses():
    g = np.random.default_rng(4)
    spread = np.ldexp(g.standard_normal((64, 64)), g.integers(-60, 60, (64, 64))).astype(np.float32)
    assert lossless.compress(spread) is None
    with pytest.raises(ValueError, match=r"\[quantize\] the exponents of w, \(64, 64\), are too many to be packed without loss\."):
        quantize(spread, "LOSSLESS")
    with pytest.raises(ValueError, match=r"\[quantize\] w must be \(out, in\) for LOSSLESS, got shape \(2, 3, 4\)"):
        quantize(np.ones((2, 3, 4), np.float32), "LOSSLESS")
    with pytest.raises(ValueError, match="with float32 activations alone, got 'int8'"):
        quantize(np.ones((4, 4), np.float32), "LOSSLESS").with_activations("int8")


@EVERY
def test_damaged_bytes_are_refused(dtype):
    """Whatever the kernels follow is checked: sizes, where the exceptions begin, and where each one belongs."""
    w = ref.random_weight(dtype, (40, 300), np.random.default_rng(5))
    q = quantize(w, "LOSSLESS")
    again = pickle.loads(pickle.dumps(q))
    np.testing.assert_array_equal(bits(again.plain()), bits(w))
    size, _, _, count = q.blocks[:32].view(np.int64)
    first, entries, total = _C.lossless_layout(size, 40, 300, count)
    assert total == q.nbytes
    assert count > 10
    words = q.blocks.view(np.int32)

    def damaged(at, value):
        blocks = q.blocks.copy()
        blocks.view(np.int32)[at // 4] = value
        with pytest.raises(ValueError, match=r"\[QuantizedArray\] blocks"):
            QuantizedArray("LOSSLESS", q.shape, blocks)

    for at, value in ((0, 3), (8, 41), (16, 299), (24, 0), (24, count + 1), (28, 1)):
        damaged(at, value)
    for at, value in ((first, 1), (first + 4, 0), (first + 4, count + 5), (first + 8, words[first // 4 + 1])):
        damaged(at, value)
    last = entries + 12 * (words[first // 4 + 1] - 1)  # of the first group
    for at, value in ((entries, -1), (entries, 300), (entries + 4, 16), (entries + 4, -1), (last, 5)):
        damaged(at, value)
    for blocks in (q.blocks[:-64], q.blocks[:100], q.blocks[None], np.concatenate([q.blocks, q.blocks])):
        with pytest.raises(ValueError, match=r"\[QuantizedArray\] blocks"):
            QuantizedArray("LOSSLESS", q.shape, blocks)
    with pytest.raises(ValueError, match=r"\[QuantizedArray\] blocks"):
        QuantizedArray("LOSSLESS", (300, 40), q.blocks)
