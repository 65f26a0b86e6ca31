"""Appending to a cache in Triton. The contract is cache_append.h; k and v are float32 or bfloat16, the cache as CacheKind says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _put(to, x, h, G, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Writes heads h of a row x (G, width) as the cache of this kind holds them."""
    head = (h < G)[:, None]
    x += (h * width)[:, None]
    if KIND == 2:
        top = tl.zeros([h.shape[0]], tl.float32)
        endless = tl.zeros([h.shape[0]], tl.int32)
        for start in range(0, width, BLOCK):
            c = (start + tl.arange(0, BLOCK))[None, :]
            a = tl.abs(tl.load(x + c, mask=head & (c < width), other=0.0).to(tl.float32))
            finite = a < float("inf")
            top = tl.maximum(top, tl.max(tl.where(finite, a, 0.0), 1))
            endless += tl.sum((~finite).to(tl.int32), 1)
        scale = tl.div_rn(top, 127.0)
        scale = tl.where(endless > 0, float("nan"), tl.where(scale < 1.17549435e-38, 0.0, scale))
        divisor = tl.where(scale > 0, scale, 1.0)[:, None]
        to += (h * (width + 4))[:, None]
        for start in range(0, width, BLOCK):
            c = (start + tl.arange(0, BLOCK))[None, :]
            inside = head & (c < width)
            n = tl.div_rn(tl.load(x + c, mask=inside, other=0.0).to(tl.float32), tl.broadcast_to(divisor, inside.shape))
            n = (n + 12582912.0) - 12582912.0  # to nearest, ties to even
            tl.store(to + c, tl.where(scale[:, None] > 0, n, 0.0).to(tl.int32).to(tl.int8), mask=inside)
        i = tl.arange(0, 4)[None, :]  # the scale is not aligned
        tl.store(to + width + i, (scale.to(tl.int32, bitcast=True)[:, None] >> (8 * i)).to(tl.int8), mask=head & (i < 4))
    else:
        to += (h * width)[:, None]
        for start in range(0, width, BLOCK):
            c = (start + tl.arange(0, BLOCK))[None, :]
            inside = head & (c < width)
            tl.store(to + c, tl.load(x + c, mask=inside, other=0.0).to(tl.float32).to(to.dtype.element_ty), mask=inside)


@triton.jit
def cache_append(
    keys,
    values,
    k,
    v,
    positions,
    table,
    paged,
    table_row,
    page,
    pages,
    T,
    G,
    D,
    E,
    capacity,
    keys_first,
    keys_batch,
    keys_time,
    values_first,
    values_batch,
    values_time,
    k_first,
    k_batch,
    k_time,
    v_first,
    v_batch,
    v_time,
    starts,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes HEADS heads of one new position; one outside the cache, or of no page, is left out. Strides count elements."""
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    at = tl.load(positions + tl.where(starts != 0, b, tl.program_id(0))) + tl.where(starts != 0, t, 0)
    inside = (at >= 0) & (at < capacity)
    n = tl.load(table + b * table_row + at // page, mask=inside & (paged != 0), other=0).to(tl.int64)
    place = tl.where(paged != 0, n, b)
    at = tl.where(paged != 0, at % page, at)
    if inside & ((paged == 0) | ((n >= 0) & (n < pages))):
        h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        _put(keys + keys_first + place * keys_batch + at * keys_time, k + k_first + b * k_batch + t * k_time, h, G, D, KIND, BLOCK)
        to = values + values_first + place * values_batch + at * values_time
        _put(to, v + v_first + b * v_batch + t * v_time, h, G, E, KIND, BLOCK)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that cache_append_gpu.py may ask for: kernel, types, constants, options. n: whether heads begin at whole vectors."""
    for (kind, cache), f, n in product(enumerate(("*fp32", "*bf16", "*i8")), ("*fp32", "*bf16"), ("i32:16", "i32")):
        types: dict[str, str | None] = {"keys": cache, "values": cache, "k": f, "v": f, "positions": "*i32"}
        types |= {"table": "*i32"} | dict.fromkeys(("paged", "table_row", "page", "pages", "T", "G"), "i32")
        types |= {"D": n, "E": n, "capacity": "i32"}
        types |= {f"{x}_{part}": n for x in ("keys", "values", "k", "v") for part in ("first", "batch", "time")}
        constants = {"KIND": kind, "HEADS": 8, "BLOCK": 64}
        yield "cache_append", types | {"starts": "i32"}, constants, {"num_warps": 4, "num_stages": 3}
