from __future__ import annotations

import pickle

import gguf
import numpy as np
import pytest

from fastlm import _C
from fastlm.checkpoint import QuantizedArray
from fastlm.testing import case_id, cases, oracle, rng

CASES = pytest.mark.parametrize("case", cases("dequantize"), ids=case_id)
KINDS = list(_C.quant_formats)


def same_bits(got, expected):
    """Every bit equal, save that any nan stands for any other."""
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def call(kind, shape, blocks):
    return QuantizedArray(kind, shape, blocks).dequantize()


@CASES
def test_forward(isa, case):
    """The bits of the reference, for blocks of random bytes: subnormal, infinite and not-a-number scales are among them."""
    ref = oracle("dequantize")
    inputs = ref.inputs(case, rng(case))
    same_bits(call(**inputs), ref.forward(**inputs))


@CASES
def test_oracle(case):
    """The reference against the gguf package."""
    ref = oracle("dequantize")
    inputs = ref.inputs(case, rng(case))
    if case["shape"][0] == 0:
        return
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(inputs["blocks"], gguf.GGMLQuantizationType[case["kind"]])
    same_bits(ref.forward(**inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_half(isa, kind):
    """Every value of d, the same bits as the gguf package."""
    _, values, size = _C.quant_formats[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (65536, size), np.uint8)
    d = slice(208, 210) if kind == "Q6_K" else slice(0, 2)
    blocks[:, d] = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    blocks = blocks if values == 32 else blocks[::7]
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    same_bits(QuantizedArray(kind, (len(blocks), values), blocks).dequantize(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows(isa, kind, threads):
    ref = oracle("dequantize")
    blocks = ref.random_blocks(kind, (37, 768), np.random.default_rng(2))
    q = QuantizedArray(kind, (37, 768), blocks)
    whole = q.dequantize()
    ids = np.array([[0, 36, 5], [5, 1, 20]], np.int32)
    rows = q.dequantize_rows(ids)
    assert rows.shape == (2, 3, 768)
    same_bits(rows, whole[ids])
    assert q.dequantize_rows(np.zeros((0,), np.int64)).shape == (0, 768)
    same_bits(q.dequantize_rows(3), whole[3])
    for n in (1, 2, 5):
        _C.set_num_threads(n)
        same_bits(q.dequantize(), whole)


def test_unaligned(isa):
    """Blocks at an odd address, as a mapped file may hold them."""
    ref = oracle("dequantize")
    for kind in KINDS:
        blocks = ref.random_blocks(kind, (3, 256), np.random.default_rng(3))
        raw = np.empty(blocks.size + 1, np.uint8)
        raw[1:] = blocks.reshape(-1)
        same_bits(QuantizedArray(kind, (3, 256), raw[1:].reshape(blocks.shape)).dequantize(), ref.forward(kind, (3, 256), blocks))


def test_properties():
    q = QuantizedArray("Q4_K", (2, 512), np.zeros((2, 288), np.uint8))
    assert (q.dtype, q.ndim, q.size, q.nbytes, len(q)) == ("Q4_K", 2, 1024, 576, 2)
    assert repr(q) == "QuantizedArray(Q4_K, (2, 512), 576 bytes)"
    q.cache["packed"] = 1
    again = pickle.loads(pickle.dumps(q))
    assert again.kind == "Q4_K"
    assert again.shape == (2, 512)
    assert again.cache == {}
    with pytest.raises(AttributeError, match="read-only"):
        q.kind = "Q8_0"
    assert QuantizedArray("Q8_0", (2, 3, 32), np.zeros((6, 34), np.uint8)).dequantize().shape == (2, 3, 32)


def test_refuses():
    blocks = np.zeros((2, 36), np.uint8)
    with pytest.raises(ValueError, match=r"kind must be one of Q4_0.*got 'Q2_K'"):
        QuantizedArray("Q2_K", (2, 64), blocks)
    with pytest.raises(ValueError, match="multiple of 32 for Q4_0"):
        QuantizedArray("Q4_0", (2, 65), blocks)
    with pytest.raises(ValueError, match=r"blocks must be \(rows, bytes of a row\) = \(2, 36\) for Q4_0 \(2, 64\), got \(2, 18\)"):
        QuantizedArray("Q4_0", (2, 64), blocks[:, :18])
    with pytest.raises(TypeError, match="blocks must be a uint8 array, got int8"):
        QuantizedArray("Q4_0", (2, 64), blocks.view(np.int8))
    q = QuantizedArray("Q4_0", (2, 64), blocks)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 2\), got 2"):
        q.dequantize_rows([0, 2])
    with pytest.raises(IndexError, match="got -1"):
        q.dequantize_rows([-1])
    with pytest.raises(TypeError, match="ids must be integers, got float64"):
        q.dequantize_rows([0.5])
