"""A table of biases by relative position, spread over the scores. Raffel et al. 2020, arXiv:1910.10683, section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import BFLOAT16, Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import accumulator, data, record, recording, wrap


def distance_bias(buckets: Any, weight: Any, positions: Any, keys: int, center: int) -> Any:
    """y[b, h, t, s] = weight[buckets[center + s - positions[b, t]], h]: what `attention` takes as its `bias`.

    buckets: (P,) int32, the bucket of each distance, from 0 to N - 1; what lies beyond an end counts as that end. weight: (N, H)
    float32 or bfloat16. positions: of the queries, (B, T) int32, or (T,) for all sequences alike, then B is 1. keys: S; key s stands
    at s. center: the index of distance 0. Returns (B, H, T, S) float32, a Tensor where weight is one. The gradient of weight is
    summed in float64. Raises TypeError for a dtype, ValueError for a shape, a bucket or a center out of range.
    """
    op = "distance_bias"
    wd = check.any_array(op, "weight", data(weight))
    if wd.dtype != np.float32 and wd.dtype != BFLOAT16:
        raise TypeError(f"[{op}] weight must be float32 or bfloat16, got {wd.dtype}.")
    if wd.ndim != 2:
        raise ValueError(f"[{op}] weight must be (N, H), got {tuple(wd.shape)}.")
    wd = contiguous(wd)
    N, H = wd.shape
    bd = check.array(op, "buckets", buckets, np.int32, ndim=1)
    low, high = (int(bd.min()), int(bd.max())) if isinstance(bd, np.ndarray) and bd.size else (0, 0)
    if low < 0 or high >= N:
        raise ValueError(f"[{op}] buckets must be from 0 to {N - 1}, got {low} to {high}.")
    if not 0 <= center < len(bd):
        raise ValueError(f"[{op}] center must be from 0 to {len(bd) - 1}, got {center}. buckets is {tuple(bd.shape)}.")
    at = check.array(op, "positions", positions, np.int32, at_least=1)
    if at.ndim > 2:
        raise ValueError(f"[{op}] positions must be (T,) or (B, T), got {tuple(at.shape)}.")
    B, T = (1, *at.shape) if at.ndim == 1 else at.shape
    y = backend.empty((B, H, T, keys), like=wd)
    kernels(wd).distance_bias_forward(y, bd, wd, at, center)
    if not recording(weight):
        return wrap(y, weight)

    def backward(dy: Array) -> Sequence[Array | None]:
        target, dweight = accumulator(weight)
        kernels(wd).distance_bias_backward(target, contiguous(dy), bd, at, center)
        return (dweight,)

    return record(y, (weight,), backward)
