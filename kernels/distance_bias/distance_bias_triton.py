"""Biases by distance in Triton. A position may be any number: distances are 64-bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _bucket(buckets, positions, row, key, P, center, mask):
    """The bucket of the distance between the query of a row of positions and a key; beyond an end it is that end's."""
    at = center + key.to(tl.int64) - tl.load(positions + row, mask=mask, other=0).to(tl.int64)
    at = tl.minimum(tl.maximum(at, 0), P - 1)
    return tl.load(buckets + at, mask=mask, other=0)


@triton.jit
def distance_bias_forward(y, buckets, weight, positions, n, H, T, S, P, center, BLOCK: tl.constexpr):
    """y (B, H, T, S), of n elements, = weight (N, H) of the buckets."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s, rest = at % S, at // S
    t, rest = rest % T, rest // T
    h, b = rest % H, rest // H
    bucket = _bucket(buckets, positions, b * T + t, s, P, center, at < n)
    value = tl.load(weight + bucket.to(tl.int64) * H + h, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y + at, value, mask=at < n)


@triton.jit
def distance_bias_backward(dweight, dy, buckets, positions, rows, H, T, S, P, center, BLOCK: tl.constexpr):
    """dweight[bucket, h] (N, H) += the sum of dy (B, H, T, S) where the bucket is this one. rows: B T."""
    mine, h = tl.program_id(0), tl.program_id(1)
    sums = tl.zeros([BLOCK], tl.float32)
    count = rows.to(tl.int64) * S
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row, s = at // S, at % S
        b, t = row // T, row % T
        bucket = _bucket(buckets, positions, row, s, P, center, at < count)
        d = tl.load(dy + ((b * H + h) * T + t) * S + s, mask=(at < count) & (bucket == mine), other=0.0).to(tl.float32)
        sums += d
    place = dweight + mine.to(tl.int64) * H + h
    tl.store(place, tl.load(place) + tl.sum(sums, 0))


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that distance_bias_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 3}
    numbers = dict.fromkeys(("H", "T", "S", "P", "center"), "i32")
    for w in ("*fp32", "*bf16"):
        types = {"y": "*fp32", "buckets": "*i32", "weight": w, "positions": "*i32", "n": "i32"}
        yield "distance_bias_forward", types | numbers, {"BLOCK": BLOCK}, options
    for d in ("*fp32", "*bf16"):
        types = {"dweight": "*fp32", "dy": d, "buckets": "*i32", "positions": "*i32", "rows": "i32"}
        yield "distance_bias_backward", types | numbers, {"BLOCK": BLOCK}, options
