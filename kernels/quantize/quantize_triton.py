"""Rows to ggml's blocks of 32 in Triton: the bytes of the CPU (quantize.h). x is float32 or bfloat16.

Products and sums are rounded separately, so the kernels are compiled without fused multiply-adds. A program makes BLOCKS blocks; the
first and the last 16 numbers of each are two tiles, since a byte holds one code of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

BLOCKS = 64


@triton.jit
def _inverse(d):
    """1 / d; 0 for a scale so small that this overflows: float16 keeps zero of it."""
    i = tl.div_rn(1.0, tl.where(d == 0.0, 1.0, d))
    return tl.where((d == 0.0) | (tl.abs(i) == float("inf")), 0.0, i)


@triton.jit
def _put_half(p, d, inside):
    """Writes d as float16. Whether it fits."""
    h = d.to(tl.float16)
    tl.store(p.to(tl.pointer_type(tl.float16)), h, mask=inside)
    return tl.abs(h.to(tl.float32)) < float("inf")


@triton.jit
def _nearest(n):
    """To a whole number, ties away from zero."""
    a = tl.abs(n)
    whole = tl.floor(a)
    b = whole + tl.floor(2.0 * (a - whole))
    return tl.where(n < 0, -b, b).to(tl.int32)


@triton.jit
def _first_largest(x):
    """The largest magnitude along the last axis, and the number that has it first."""
    a = tl.abs(x)
    i = tl.argmax(a, 1, tie_break_left=True)
    return tl.max(a, 1), tl.sum(tl.where(tl.arange(0, 16)[None, :] == i[:, None], x, 0.0), 1)


@triton.jit
def quantize(blocks, x, bad, n, each, KIND: tl.constexpr, BYTES: tl.constexpr, BLOCKS: tl.constexpr):
    """blocks (n, BYTES) of x (n, 32), `each` to a row. bad (1,): the least row that cannot be written, where one is less than it says."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < n)[:, None]
    i = tl.arange(0, 16)[None, :]
    from_ = x + block.to(tl.int64)[:, None] * 32 + i
    a = tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(from_ + 16, mask=inside, other=0.0).to(tl.float32)
    to = blocks + block.to(tl.int64) * BYTES
    endless = (tl.abs(a) < float("inf")) & (tl.abs(b) < float("inf"))
    fits = tl.min(endless.to(tl.int32), 1) != 0
    a, b = tl.where(fits[:, None], a, 0.0), tl.where(fits[:, None], b, 0.0)
    if KIND == 8:
        d = tl.div_rn(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1), 127.0)
        scale = _inverse(d)[:, None]
        fits = fits & _put_half(to, d, block < n)
        tl.store(to[:, None] + 2 + i, _nearest(a * scale).to(tl.uint8), mask=inside)
        tl.store(to[:, None] + 18 + i, _nearest(b * scale).to(tl.uint8), mask=inside)
    else:
        most: tl.constexpr = 31 if KIND >= 6 else 15
        head: tl.constexpr = 4 if KIND == 3 or KIND == 7 else 2
        if head == 4:
            low = tl.min(tl.minimum(a, b), 1)
            d = tl.div_rn(tl.max(tl.maximum(a, b), 1) - low, most * 1.0)
            fits = fits & _put_half(to, d, block < n) & _put_half(to + 2, low, block < n)
            scale = _inverse(d)[:, None]
            qa = ((a - low[:, None]) * scale + 0.5).to(tl.int32)
            qb = ((b - low[:, None]) * scale + 0.5).to(tl.int32)
        else:
            middle: tl.constexpr = (most + 1) // 2
            one, first = _first_largest(a)
            two, second = _first_largest(b)
            d = tl.div_rn(tl.where(two > one, second, first), -middle * 1.0)
            fits = fits & _put_half(to, d, block < n)
            scale = _inverse(d)[:, None]
            qa = (a * scale + (middle + 0.5)).to(tl.int32)
            qb = (b * scale + (middle + 0.5)).to(tl.int32)
        qa, qb = tl.minimum(qa, most), tl.minimum(qb, most)
        if most == 31:
            fifth = tl.sum((qa >> 4) << i, 1) | (tl.sum((qb >> 4) << i, 1) << 16)
            j = tl.arange(0, 4)[None, :]
            tl.store(to[:, None] + head + j, (fifth[:, None] >> (8 * j)).to(tl.uint8), mask=inside)
        tail: tl.constexpr = head + (4 if most == 31 else 0)
        tl.store(to[:, None] + tail + i, ((qa & 15) | (qb & 15) << 4).to(tl.uint8), mask=inside)
    worst = tl.min(tl.where((block < n) & (fits == 0), block // each, 0x7FFFFFFF), 0)
    if worst < 0x7FFFFFFF:
        tl.atomic_min(bad, worst)  # whole numbers: the order does not matter


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """Every form that quantize_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    for (kind, size), x in product({2: 18, 3: 20, 6: 22, 7: 24, 8: 34}.items(), ("*fp32", "*bf16")):
        types = {"blocks": "*u8", "x": x, "bad": "*i32", "n": "i32", "each": "i32"}
        yield "quantize", types, {"KIND": kind, "BYTES": size, "BLOCKS": BLOCKS}, options
