"""Rotary position embedding in Triton. The contract is rope.h; x and y are float32 or bfloat16, the tables float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl


@triton.jit
def rope_forward(
    y,
    x,
    cos,
    sin,
    positions,
    T,
    H,
    D,
    half,
    P,
    x_first,
    x_batch,
    x_time,
    positions_batch,
    placed,
    sign,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program takes HEADS heads of one position. x begins x_first elements behind its pointer; positions is read if `placed`.

    What has a position outside the tables becomes nan.
    """
    b, t = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    at = t
    if placed:
        at = tl.load(positions + b * positions_batch + t)
    known = (at >= 0) & (at < P)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head = (h < H)[:, None]
    from_ = x + x_first + b * x_batch + t.to(tl.int64) * x_time + (h * D)[:, None]
    to = y + tl.program_id(0).to(tl.int64) * H * D + (h * D)[:, None]
    for start in range(0, half, PAIRS):
        i = start + tl.arange(0, PAIRS)
        c = tl.load(cos + at.to(tl.int64) * half + i, mask=(i < half) & known, other=float("nan"))[None, :]
        s = tl.load(sin + at.to(tl.int64) * half + i, mask=(i < half) & known, other=float("nan"))[None, :] * sign
        if INTERLEAVED:
            j = (2 * start + tl.arange(0, 2 * PAIRS))[None, :]
            inside = head & (j < 2 * half)
            v = tl.load(from_ + j, mask=inside, other=0.0).to(tl.float32)
            one, two = tl.split(tl.reshape(v, [HEADS, PAIRS, 2]))
            v = tl.reshape(tl.join(one * c - two * s, two * c + one * s), [HEADS, 2 * PAIRS])
            tl.store(to + j, v.to(y.dtype.element_ty), mask=inside)
        else:
            inside = head & (i < half)[None, :]
            one = tl.load(from_ + i[None, :], mask=inside, other=0.0).to(tl.float32)
            two = tl.load(from_ + half + i[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(to + i[None, :], (one * c - two * s).to(y.dtype.element_ty), mask=inside)
            tl.store(to + half + i[None, :], (two * c + one * s).to(y.dtype.element_ty), mask=inside)
    for start in range(2 * half, D, PAIRS):
        i = (start + tl.arange(0, PAIRS))[None, :]
        inside = head & (i < D)
        tl.store(to + i, tl.load(from_ + i, mask=inside), mask=inside)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that rope_gpu.py may ask for: kernel, types, constants, options. n: whether heads begin at whole vectors."""
    for f, n, interleaved in product(("*fp32", "*bf16"), ("i32:16", "i32"), (False, True)):
        types: dict[str, str | None] = {"y": f, "x": f, "cos": "*fp32", "sin": "*fp32", "positions": "*i32", "T": "i32", "H": "i32"}
        types |= {"D": n, "half": n, "P": "i32", "x_first": n, "x_batch": n, "x_time": n}
        types |= {"positions_batch": "i32", "placed": "i32", "sign": "fp32"}
        constants = {"INTERLEAVED": interleaved, "HEADS": 8, "PAIRS": 64}
        yield "rope_forward", types, constants, {"num_warps": 4, "num_stages": 3}
