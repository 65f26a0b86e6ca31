"""Counters that live in memory: the lengths of a cache, the steps of a sequence's random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, kernels, on_device
from fastlm.ops import check


def advance(x: Array, by: int = 1, out: Array | None = None) -> Array:
    """x + by. x: int32 or int64, any shape. out: where it goes, x itself to count in place. As a kernel, so that a recorded step
    counts when it runs. Raises TypeError for a dtype, ValueError for a shape."""
    if on_device(x):
        return _there(x, by, out)
    if not isinstance(x, np.ndarray) or x.dtype not in (np.int32, np.int64) or not x.flags.c_contiguous:
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"[advance] x must be a contiguous array of int32 or int64, got {got}.")
    if out is None:
        out = backend.empty(x.shape, x.dtype)
    if out.dtype != x.dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise TypeError(f"[advance] out must be contiguous, writable and {x.dtype} as x, got {out.dtype}.")
    check.shape("advance", "out", out, "the shape of x", x.shape)
    _C.advance(out, x, by)
    return out


def positions(starts: Array, time: int) -> Array:
    """starts[:, None] + 0 .. time - 1. starts: (B,) int32; returns (B, time) int32. As a kernel, see `advance`; on the host alone."""
    if not isinstance(starts, np.ndarray) or starts.dtype != np.int32 or starts.ndim != 1 or not starts.flags.c_contiguous:
        raise TypeError(
            f"[positions] starts must be a contiguous array (B,) of int32, got {getattr(starts, 'dtype', type(starts))}."
        )
    out = backend.empty((len(starts), time), np.int32)
    _C.positions(out, starts)
    return out


def _there(x: Any, by: int, out: Any) -> Array:
    """The same on a device."""
    if x.dtype not in (np.int32, np.int64) or not x.contiguous:
        raise TypeError(f"[advance] x must be a contiguous array of int32 or int64, got {x.dtype}.")
    out = backend.empty_like(x) if out is None else out
    if out.dtype != x.dtype or out.shape != x.shape or not out.contiguous:
        raise TypeError(f"[advance] out must be contiguous, {x.dtype} {x.shape} as x, got {out.dtype} {out.shape}.")
    kernels(x).advance(out, x, by)
    there: Array = out
    return there
