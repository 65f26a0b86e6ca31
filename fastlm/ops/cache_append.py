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


def cache_append(keys: Array, values: Array, k: Any, v: Any, positions: Array) -> None:
    """keys[b, positions[b, t]] = k[b, t] and the same for values, in place, rounded to the cache's dtype.

    keys: (B, capacity, G, D), values: (B, capacity, G, E), both float32, bfloat16 or int8; any stride over batch and time. int8 has
    4 bytes more, (B, capacity, G, D + 4): a head's whole numbers from -127 to 127, then their scale, a float32: max |x| / 127.
    k: (B, T, G, D), v: (B, T, G, E) float32, views with any stride over batch and time. positions: (B, T) int32, no two of a
    sequence the same, or (B,): the first of T that follow each other. No gradient. On a device k and v may be bfloat16, and what has a
    position there outside the cache is left out.
    Raises TypeError for a dtype, ValueError for a shape or a position outside the cache.
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
    capacity = _cache("keys", keys, B, keys.shape[1] if keys.ndim == 4 else 0, G, D + extra)
    _cache("values", values, B, capacity, G, E + extra)
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
    if not isinstance(keys, np.ndarray):
        positions = backend.put(positions, keys.device)
    kernels(keys).cache_append(keys, values, kd, vd, positions, kind)


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


def _cache(name: str, x: Array, B: int, capacity: int, G: int, width: int) -> int:
    check.shape("cache_append", name, x, "(B, capacity, G, D or E; 4 more for int8)", (B, capacity, G, width))
    if not _walkable(x) or (isinstance(x, np.ndarray) and not x.flags.writeable):
        raise ValueError(f"[cache_append] {name} must be writable, its last two axes contiguous, got strides {x.strides}.")
    return capacity
