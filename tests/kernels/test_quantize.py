from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest

from fastlm import _C
from fastlm.checkpoint.quantized import WRITTEN, quantize
from fastlm.testing import case_id, cases, oracle, rng

CASES = pytest.mark.parametrize("case", cases("quantize"), ids=case_id)
KINDS = pytest.mark.parametrize("kind", WRITTEN)


def call(w, kind):
    """The bytes as numbers, on the host: how tests/gpu calls it."""
    blocks = quantize(w, kind).blocks
    return (blocks if isinstance(blocks, np.ndarray) else blocks.numpy()).astype(np.float32)


@CASES
def test_forward(isa, case):
    ref = oracle("quantize")
    inputs = ref.inputs(case, rng(case))
    array = quantize(**inputs)
    assert (array.kind, array.shape) == (case["kind"], case["shape"])
    np.testing.assert_array_equal(array.blocks, ref.forward(**inputs).reshape(array.blocks.shape))


def awkward(kind):
    """Zeros, ties, one number alone, both ends, subnormal scales, what float16 rounds, every exponent."""
    g = np.random.default_rng(7)
    x = g.standard_normal((400, 96)).astype(np.float32)
    x[0] = 0
    x[1, 1:] = 0
    x[2] = -3.5
    x[3] = np.arange(96) - 40
    x[4] = np.tile([7.5, -8.0, 0.5, 1.5, -0.5, 2.5], 16)
    x[5] = np.abs(x[5])
    x[6] = -np.abs(x[6])
    x[7:390] *= np.float32(2.0) ** np.linspace(-37, 14, 383)[:, None].astype(np.float32)
    x[390] = np.linspace(-65504, 65504, 96) / 16
    return x


@KINDS
def test_against_gguf(isa, kind):
    for x in (awkward(kind), np.random.default_rng(8).standard_normal((2000, 256)).astype(np.float32) / 20):
        want = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(quantize(x, kind).blocks, want)


@KINDS
def test_threads_and_axes(threads, kind):
    x = np.random.default_rng(9).standard_normal((3, 37, 64)).astype(np.float32)
    whole = quantize(x, kind)
    assert whole.shape == (3, 37, 64)
    for n in (1, 2, 3):
        _C.set_num_threads(n)
        np.testing.assert_array_equal(quantize(x, kind).blocks, whole.blocks)
    half = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(quantize(half, kind).blocks, quantize(half.astype(np.float32), kind).blocks)
    np.testing.assert_array_equal(quantize(x.swapaxes(0, 1), kind).blocks, quantize(x.swapaxes(0, 1).copy(), kind).blocks)


def test_again_the_same(isa):
    """What came out of Q8_0 blocks goes back into the same blocks, when the largest code is 127."""
    x = np.random.default_rng(10).standard_normal((50, 64)).astype(np.float32)
    once = quantize(x, "Q8_0")
    again = quantize(once.dequantize(), "Q8_0")
    assert np.mean(again.blocks == once.blocks) > 0.999


def test_refuses(isa):
    x = np.zeros((20, 64), np.float32)
    for bad in (np.nan, np.inf, 1e9):
        y = x.copy()
        y[17, 3] = bad
        y[18, 3] = bad
        for kind in WRITTEN:
            with pytest.raises(ValueError, match=r"\[quantize\] every number must be finite .* row 17 has others"):
                quantize(y, kind)
    with pytest.raises(ValueError, match="kind must be one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_ROW, LOSSLESS, got 'Q6_K'"):
        quantize(x, "Q6_K")
    with pytest.raises(ValueError, match=r"multiple of 32 for Q8_0, got shape \(20, 63\)"):
        quantize(x[:, :63], "Q8_0")
    with pytest.raises(TypeError, match="float32, bfloat16 or float16 array, got float64"):
        quantize(x.astype(np.float64), "Q8_0")
