"""A table of biases by relative position, spread over the scores. Raffel et al. 2020, arXiv:1910.10683, section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.ops import check
from fastlm.tensor import data, leaf, record, recording, wrap


def relative_bias(buckets: Any, weight: Any) -> Any:
    """bias[0, h, t, s] = weight[buckets[t, s], h]: what `attention` takes as its `bias`.

    buckets: (T, S) integers from 0 to N - 1. weight: (N, H) float32. Returns (1, H, T, S) float32, a Tensor where weight is one. The
    gradient of weight is summed in float64 in the order of the scores. NumPy on purpose: one gather for a whole stack of layers.
    Raises TypeError for a dtype, ValueError for a shape or a bucket out of range.
    """
    wd = check.array("relative_bias", "weight", data(weight), ndim=2)
    bd = np.asarray(buckets)
    if bd.dtype.kind not in "iu":
        raise TypeError(f"[relative_bias] buckets must be integers, got {bd.dtype}.")
    if bd.ndim != 2:
        raise ValueError(f"[relative_bias] buckets must be (T, S), got {bd.shape}.")
    if bd.size and (bd.min() < 0 or bd.max() >= len(wd)):
        raise ValueError(f"[relative_bias] buckets must be from 0 to {len(wd) - 1}, got {bd.min()} to {bd.max()}.")
    y = backend.empty((1, wd.shape[1], *bd.shape))
    np.take(wd.T, bd, axis=1, out=y[0])
    if not recording(weight):
        return wrap(y, weight)

    def backward(dy: Array) -> Sequence[Array | None]:
        flat = bd.reshape(-1)
        counts = [np.bincount(flat, dy[0, h].reshape(-1), minlength=len(wd)) for h in range(wd.shape[1])]
        dweight = np.ascontiguousarray(np.stack(counts, axis=1).astype(np.float32))
        target = leaf(weight)
        if target is None:
            return (dweight,)
        target.grad_buffer()[...] += dweight
        return (None,)

    return record(y, (weight,), backward)
