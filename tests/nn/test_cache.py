from __future__ import annotations

import numpy as np
import pytest

from fastlm.nn import Cache, Context
from fastlm.testing import oracle


def filled(lengths):
    cache = Cache(2, len(lengths), 8, 2, 3)
    for layer in range(2):
        cache.keys[layer][:] = np.arange(cache.keys[layer].size).reshape(cache.keys[layer].shape)
        cache.values[layer][:] = -cache.keys[layer]
    cache.lengths[:] = lengths
    return cache


def test_row_shares_memory():
    cache = filled([3, 5])
    row = cache.row(1)
    row.keys[0][:] = 7
    row.lengths += np.int32(1)
    assert (cache.keys[0][1] == 7).all()
    assert cache.lengths.tolist() == [3, 6]
    with pytest.raises(IndexError, match=r"\[cache\] row must be from 0 to 1, got 2"):
        cache.row(2)


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2, 2], [0, 1, 2], [1], [0, 0, 1, 2, 2]])
def test_select(rows):
    cache, before = filled([3, 5, 4]), filled([3, 5, 4])
    lengths = cache.lengths
    assert cache.select(rows) is cache
    assert cache.lengths.tolist() == before.lengths[rows].tolist()
    assert len(rows) != 3 or cache.lengths is lengths
    for layer in range(2):
        for i, row in enumerate(rows):
            n = before.lengths[row]
            np.testing.assert_array_equal(cache.keys[layer][i, :n], before.keys[layer][row, :n])
            np.testing.assert_array_equal(cache.values[layer][i, :n], before.values[layer][row, :n])
    with pytest.raises(IndexError, match="rows"):
        cache.select([0, 9])


@pytest.mark.parametrize(("dtype", "width"), [("float32", 8), ("bfloat16", 8), ("int8", 12)])
def test_dtypes(dtype, width):
    """What is appended comes back rounded, and moves with its scale."""
    cache = Cache(1, 2, 6, 3, 8, dtype)
    assert cache.keys[0].shape == cache.values[0].shape == (2, 6, 3, width)
    cache.keys[0][:] = cache.values[0][:] = 0
    cache.lengths[:] = (3, 1)
    context = Context(2, 2, cache)
    k = np.random.default_rng(0).standard_normal((2, 2, 3, 8), np.float32)
    keys, values = context.append(0, k, -k)
    context.finish()
    ref = oracle("cache_append")
    for b, n in enumerate((3, 1)):
        np.testing.assert_array_equal(keys[b, n : n + 2], ref.packed(k[b], keys.dtype))
        np.testing.assert_array_equal(values[b, n : n + 2], ref.packed(-k[b], keys.dtype))
    before = keys.copy()
    np.testing.assert_array_equal(cache.select([1, 0, 1]).keys[0][:, :5], before[[1, 0, 1]])
    assert cache.keys[0].dtype == before.dtype
    with pytest.raises(ValueError, match=r"\[cache\] dtype must be one of 'float32', 'bfloat16', 'int8', got 'int4'"):
        Cache(1, 2, 6, 3, 8, "int4")


@pytest.mark.parametrize("lengths", [[4, 4], [2, 5]])
def test_append(lengths):
    cache = filled(lengths)
    context = Context(2, 3, cache)
    k = np.full((2, 3, 2, 3), 100.0, np.float32)
    keys, values = context.append(1, k, -k)
    assert keys.shape == (2, max(lengths) + 3, 2, 3)
    for b, n in enumerate(lengths):
        assert (keys[b, n : n + 3] == 100).all()
        assert (values[b, n : n + 3] == -100).all()
        assert (keys[b, :n] != 100).all()
    assert cache.lengths.tolist() == lengths
    context.finish()
    assert cache.lengths.tolist() == [n + 3 for n in lengths]


def test_capacity():
    with pytest.raises(ValueError, match=r"\[cache\] capacity must be at least 9 for 4 more positions after 5, got 8"):
        Context(2, 4, filled([2, 5]))
    with pytest.raises(ValueError, match=r"as many sequences as the cache, 2, got 3"):
        Context(3, 1, filled([2, 5]))
