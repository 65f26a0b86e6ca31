"""Counters that live in memory: the lengths of a cache, the steps of a sequence's random numbers."""

from __future__ import annotations

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.ops import check


def advance(x: Array, by: int = 1, out: Array | None = None) -> Array:
    """x + by. x: int32 or int64, any shape. out: where it goes, x itself to count in place. As a kernel, so that a recorded step
    counts when it runs. Raises TypeError for a dtype, ValueError for a shape."""
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
