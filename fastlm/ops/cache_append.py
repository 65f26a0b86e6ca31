"""Appending to a cache of keys and values, which may be float32, bfloat16 or int8."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import data

_F32 = np.dtype(np.float32)
_I32 = np.dtype(np.int32)
CACHE_KINDS = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.int8): 2}
SCALE = 4  # bytes of the scale behind each head's vector in an int8 cache
PAGE = 64  # a page of a cache holds a multiple of so many positions: attention's tiles of keys


def cache_append(keys: Array, values: Array, k: Any, v: Any, positions: Array, table: Any = None) -> None:
    """keys[b, positions[b, t]] = k[b, t] and the same for values, in place, rounded to the cache's dtype.

    keys: (B, capacity, G, D), values: (B, capacity, G, E), both float32, bfloat16 or int8; any stride over batch and time. int8 has
    4 bytes more, (B, capacity, G, D + 4): a head's whole numbers from -127 to 127, then their scale, a float32: max |x| / 127.
    k: (B, T, G, D), v: (B, T, G, E) float32, views with any stride over batch and time. positions: (B, T) int32, no two of a
    sequence the same, or (B,): the first of T that follow each other. No gradient. On a device k and v may be bfloat16, and what has a
    position there outside the cache is left out.
    table: (B, blocks) int32, where sequences lie in pages: keys and values are then (pages, page, G, .), and position i of sequence b
    is number i % page of page table[b, i // page]. page is a multiple of 64; the capacity is blocks * page. On a device the table's
    numbers are not checked, since they would have to be waited for: what would go to no page is left out.
    Raises TypeError for a dtype, ValueError for a shape, a position outside the cache or a number that is no page's.
    """
    kd, vd = head_view("cache_append", "k", data(k)), head_view("cache_append", "v", data(v))
    B, T, G, D = kd.shape
    E = vd.shape[3]
    if vd.shape[:3] != (B, T, G):
        check.shape("cache_append", "v", vd, "(B, T, G, E)", (B, T, G, E), f"k is {kd.shape}.")
    kind = CACHE_KINDS.get(getattr(keys, "dtype", None), -1)
    if kind < 0 or getattr(values, "dtype", None) != keys.dtype:
        got = f"{getattr(keys, 'dtype', type(keys).__name__)} and {getattr(values, 'dtype', type(values).__name__)}"
        raise TypeError(f"[cache_append] keys and values must both be arrays of float32, bfloat16 or int8, got {got}.")
    extra = SCALE if kind == 2 else 0
    rows = keys.shape[1] if keys.ndim == 4 else 0
    arrays = B if table is None or keys.ndim != 4 else keys.shape[0]
    _cache("keys", keys, arrays, rows, G, D + extra, table)
    _cache("values", values, arrays, rows, G, E + extra, table)
    table = None if table is None else page_table("cache_append", table, B, keys)
    capacity = rows if table is None else table.shape[1] * rows
    if not isinstance(keys, np.ndarray) or not isinstance(kd, np.ndarray):
        check.together("cache_append", "keys", keys, values=values, k=kd, v=vd)
    if not isinstance(positions, np.ndarray) or positions.dtype != _I32 or not positions.flags.c_contiguous:
        positions = check.array("cache_append", "positions", positions, dtype=np.int32)
    if positions.shape != (B,) and positions.shape != (B, T):
        raise ValueError(f"[cache_append] positions must be (B, T) = {(B, T)} or (B,) = {(B,)}, got {positions.shape}.")
    if isinstance(positions, np.ndarray) and positions.size and T:
        first, last = int(positions.min()), int(positions.max())
        last += T - 1 if positions.ndim == 1 else 0
        if first < 0 or last >= capacity:
            raise ValueError(
                f"[cache_append] positions must be from 0 to capacity - 1 = {capacity - 1}, got {first} to {last}. "
                "Make the cache larger, or append less."
            )
        if isinstance(table, np.ndarray):
            at = positions if positions.ndim == 2 else positions[:, None] + np.arange(T, dtype=np.int32)
            check_pages("cache_append", np.take_along_axis(table, at // np.int32(rows), axis=1), keys)
    if not isinstance(keys, np.ndarray):
        positions = backend.put(positions, keys.device)
        table = backend.put(table, keys.device)
    kernels(keys).cache_append(keys, values, kd, vd, positions, kind, table)


def page_table(op: str, table: Any, B: int, keys: Array) -> Array:
    """A table of pages as the kernels walk it: (B, blocks) int32, any stride over B. keys: (pages, page, G, .)."""
    table = check.any_array(op, "table", table, _I32)
    if table.ndim != 2 or table.shape[0] != B:
        raise ValueError(f"[{op}] table must be (B, blocks) with B = {B}, got {table.shape}.")
    pages, page = keys.shape[:2]
    if page == 0 or page % PAGE:
        raise ValueError(f"[{op}] a page must hold a multiple of {PAGE} positions, got {page}. The pages are {keys.shape}.")
    if pages == 0 and table.size:
        raise ValueError(f"[{op}] there must be a page for a table {table.shape}, got pages {keys.shape}.")
    lies = table.strides[1] == table.itemsize or table.shape[1] <= 1
    result: Array = table if lies else contiguous(table)
    return result


def check_pages(op: str, numbers: Array, keys: Array) -> None:
    """ValueError unless these numbers of a table are pages."""
    if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= keys.shape[0]):
        low, high = int(numbers.min()), int(numbers.max())
        raise ValueError(
            f"[{op}] table must have numbers from 0 to pages - 1 = {keys.shape[0] - 1} where keys are, got {low} to {high}."
        )


def head_view(op: str, name: str, x: Any, dtype: Any = _F32) -> Array:
    """x (B, T, H, D) as it lies if the kernels can walk it, else a copy."""
    if not isinstance(x, np.ndarray) or x.dtype != dtype or x.ndim != 4:
        x = check.any_array(op, name, x, dtype)
        if x.ndim != 4:
            raise ValueError(f"[{op}] {name} must have 4 axes, got shape {x.shape}.")
    return x if _walkable(x) else contiguous(x)


def _walkable(x: Array) -> bool:
    """Heads and their vectors follow each other; batch and time have any stride in whole elements."""
    batch, time, head, last = x.strides
    size, (_, _, heads, width) = x.dtype.itemsize, x.shape
    rows = (last == size or width == 1) and (head == size * width or heads == 1)
    return x.size == 0 or (rows and (batch | time) & (size - 1) == 0)


def _cache(name: str, x: Array, B: int, capacity: int, G: int, width: int, table: Any) -> None:
    first = "(B, capacity, G" if table is None else "(pages, page, G"
    check.shape("cache_append", name, x, f"{first}, D or E; 4 more for int8)", (B, capacity, G, width))
    if not _walkable(x) or (isinstance(x, np.ndarray) and not x.flags.writeable):
        raise ValueError(f"[cache_append] {name} must be writable, its last two axes contiguous, got strides {x.strides}.")
