from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fastlm import _C, ops
from fastlm.testing import case_id, cases, check_forward, oracle, rng

CASES = pytest.mark.parametrize("case", cases("cache_append"), ids=case_id)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8], ids=["float32", "bfloat16", "int8"])
ref = oracle("cache_append")


def call(keys, values, k, v, positions, table=None):
    keys, values = keys.copy(), values.copy()
    ops.cache_append(keys, values, k, v, positions, table)
    return keys, values


@CASES
def test_forward(isa, case):
    check_forward("cache_append", call, case)


@DTYPES
@CASES
def test_kinds(isa, threads, case, dtype):
    """Exactly the oracle's rounding, on any number of threads; nothing else in the cache changes."""
    x = ref.inputs(case, rng(case))
    x["k"], x["v"] = x["k"] * 3, x["v"] * 1e-3
    x["keys"], x["values"] = ref.packed(x["keys"], dtype), ref.packed(x["values"], dtype)
    for n in (1, 3):
        _C.set_num_threads(n)
        for got, want in zip(call(**x), ref.forward(**x), strict=True):
            np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def test_int8_rounding(isa):
    """Half a step at most, the largest exactly 127; ties, tiny and endless numbers as the contract has it."""
    x = np.random.default_rng(0).standard_normal((1, 500, 1, 40), np.float32)
    x[0, 1] = 0
    x[0, 2] = 1e-39
    x[0, 3] = np.arange(40) / np.float32(2)
    x[0, 3, 0, 39] = 127
    x[0, 4, 0, 7] = np.inf
    x[0, 5, 0, 7] = np.nan
    x[0, 6] *= 1e37
    cache = np.zeros((1, 500, 1, 44), np.int8)
    ops.cache_append(cache, cache.copy(), x, x, np.zeros(1, np.int32))
    np.testing.assert_array_equal(cache, ref.packed(x, np.int8))
    y, scale = ref.unpacked(cache), np.ascontiguousarray(cache[..., -4:]).view(np.float32)
    rows = [i for i in range(500) if i not in (4, 5)]
    assert (np.abs(y - x)[:, rows] <= scale[:, rows] * np.float32(0.5001) + 1e-38).all()
    assert (np.abs(cache[0, 6:, :, :40].astype(int)).max(-1) == 127).all()
    assert not y[0, 1:3].any()
    np.testing.assert_array_equal(cache[0, 3, 0, :6], [0, 0, 1, 2, 2, 2])
    assert np.isnan(y[0, 4:6]).all()


@DTYPES
def test_views(isa, dtype):
    """One sequence of a cache, and pieces of a fused projection."""
    generator = np.random.default_rng(1)
    fused = generator.standard_normal((1, 4, 8 * 31), np.float32)
    k, v = (np.lib.stride_tricks.as_strided(fused[:, :, i * 31 :], (1, 4, 2, 31), (*fused.strides[:2], 31 * 4, 4)) for i in (3, 5))
    cache = [ref.packed(generator.standard_normal((3, 9, 2, 31), np.float32), dtype) for _ in range(2)]
    want = ref.forward(cache[0][1:2], cache[1][1:2], k.copy(), v.copy(), np.array([3], np.int32))
    before = [c.copy() for c in cache]
    ops.cache_append(cache[0][1:2], cache[1][1:2], k, v, np.array([3], np.int32))
    for c, b, w in zip(cache, before, want, strict=True):
        np.testing.assert_array_equal(c[1:2], w)
        np.testing.assert_array_equal(c[::2], b[::2])


def test_refuses():
    cache = np.zeros((2, 9, 3, 8), np.float32)
    k = np.zeros((2, 4, 3, 8), np.float32)
    at = np.array([0, 5], np.int32)
    append = ops.cache_append
    with pytest.raises(ValueError, match=r"\[cache_append\] positions must be from 0 to capacity - 1 = 8, got 0 to 9"):
        append(cache, cache, k, k, np.array([0, 6], np.int32))
    with pytest.raises(ValueError, match=r"got -1 to 8"):
        append(cache, cache, k, k, np.array([-1, 5], np.int32))
    with pytest.raises(ValueError, match=r"positions must be \(B, T\) = \(2, 4\) or \(B,\) = \(2,\), got \(4,\)"):
        append(cache, cache, k, k, np.zeros(4, np.int32))
    with pytest.raises(TypeError, match=r"positions must be int32, got int64"):
        append(cache, cache, k, k, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"\[cache_append\] keys must be .* = \(2, 9, 3, 8\), got \(2, 9, 3, 7\)"):
        append(cache[..., :7].copy(), cache, k, k, at)
    with pytest.raises(ValueError, match=r"\[cache_append\] values must be .* = \(2, 9, 3, 12\), got \(2, 9, 3, 8\)"):
        append(np.zeros((2, 9, 3, 12), np.int8), cache.astype(np.int8), k, k, at)
    with pytest.raises(ValueError, match=r"\[cache_append\] v must be \(B, T, G, E\) = \(2, 4, 3, 8\), got \(2, 3, 3, 8\)"):
        append(cache, cache, k, k[:, :3], at)
    with pytest.raises(ValueError, match=r"keys must be writable, its last two axes contiguous"):
        append(np.zeros((2, 9, 8, 3), np.float32).swapaxes(2, 3), cache, k, k, at)
    with pytest.raises(
        TypeError, match=r"keys and values must both be arrays of float32, bfloat16 or int8, got float16 and float32"
    ):
        append(cache.astype(np.float16), cache, k, k, at)
    with pytest.raises(TypeError, match=r"\[cache_append\] k must be float32, got float64"):
        append(cache, cache, k.astype(np.float64), k, at)


def test_pages_refuses():
    cache, k = np.zeros((4, 64, 3, 8), np.float32), np.zeros((2, 2, 3, 8), np.float32)
    table, at = np.array([[0, 9], [2, 1]], np.int32), np.array([62, 126], np.int32)
    append = ops.cache_append
    append(cache, cache, k, k, at, table)
    with pytest.raises(ValueError, match=r"\[cache_append\] table must have numbers from 0 to pages - 1 = 3 .*, got 0 to 9"):
        append(cache, cache, k, k, np.array([63, 126], np.int32), table)
    with pytest.raises(ValueError, match=r"positions must be from 0 to capacity - 1 = 127, got 62 to 128"):
        append(cache, cache, k, k, np.array([62, 127], np.int32), table)
    with pytest.raises(ValueError, match=r"keys must be \(pages, page, G, .* = \(4, 64, 3, 8\), got \(4, 64, 2, 8\)"):
        append(cache[:, :, :2], cache, k, k, at, table)
    with pytest.raises(ValueError, match=r"table must be \(B, blocks\) with B = 2, got \(3, 2\)"):
        append(cache, cache, k, k, at, np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match=r"a page must hold a multiple of 64 positions, got 32"):
        append(cache[:, :32], cache[:, :32], k, k, at, table)
    with pytest.raises(ValueError, match=r"there must be a page for a table \(2, 2\), got pages \(0, 64, 3, 8\)"):
        append(cache[:0], cache[:0], k, k, at, table)
