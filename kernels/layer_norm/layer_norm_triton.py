"""Layer normalization in Triton. The contract is layer_norm.h; arrays are float32 or bfloat16, statistics and sums float32.

A program takes a row, in blocks of columns: the second and third pass read it from cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _row(x, residual, at, inside):
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def layer_norm_forward(y, total, stats, x, residual, weight, bias, C, eps, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * C
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = _row(x, residual, first + c, c < C)
        if residual is not None:
            tl.store(total + first + c, v.to(total.dtype.element_ty), mask=c < C)
        sums += v
    mean = tl.sum(sums, 0) / C
    # `mean` is rounded: `rest` is what it lacks.
    rests = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        d = tl.where(c < C, _row(x, residual, first + c, c < C) - mean, 0.0)
        rests += d
        squares += d * d
    rest = tl.sum(rests, 0) / C
    rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(squares, 0) / C - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    shift = -rest * rstd
    at = stats + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, mean)
    tl.store(at + 1, shift)
    tl.store(at + 2, rstd)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        normal = (_row(x, residual, first + c, c < C) - mean) * rstd + shift
        out = normal * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        if bias is not None:
            out += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(y + first + c, out.to(y.dtype.element_ty), mask=c < C)


@triton.jit
def layer_norm_backward_x(dx, dy, dtotal, x, weight, stats, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = row * C
    mean, shift, rstd = tl.load(stats + row * 3), tl.load(stats + row * 3 + 1), tl.load(stats + row * 3 + 2)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_gn = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < C
        g = tl.load(dy + first + c, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        normal = (tl.load(x + first + c, mask=inside, other=0.0).to(tl.float32) - mean) * rstd + shift
        sum_g += g
        sum_gn += g * normal
    mean_g, mean_gn = tl.sum(sum_g, 0) / C, tl.sum(sum_gn, 0) / C
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < C
        g = tl.load(dy + first + c, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        normal = (tl.load(x + first + c, mask=inside, other=0.0).to(tl.float32) - mean) * rstd + shift
        d = rstd * (g - (normal * mean_gn + mean_g))
        if dtotal is not None:
            d += tl.load(dtotal + first + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + first + c, d.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward_partial(partial, dy, x, stats, R, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """partial (pieces, 2, C): each program sums a piece of ROWS rows for a block of columns."""
    piece = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = piece * ROWS + i
        if row < R:
            d = tl.load(dy + row * C + c, mask=c < C, other=0.0).to(tl.float32)
            v = tl.load(x + row * C + c, mask=c < C, other=0.0).to(tl.float32)
            mean, shift, rstd = tl.load(stats + row * 3), tl.load(stats + row * 3 + 1), tl.load(stats + row * 3 + 2)
            dweight += d * ((v - mean) * rstd + shift)
            dbias += d
    tl.store(partial + 2 * piece * C + c, dweight, mask=c < C)
    tl.store(partial + (2 * piece + 1) * C + c, dbias, mask=c < C)


@triton.jit
def layer_norm_backward_parameters(sums, partial, part, pieces, C, BLOCK: tl.constexpr):
    """sums (C,) += part 0 (of the weight) or 1 (of the bias) of the partial sums, in their order."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(pieces):
        total += tl.load(partial + (2 * i + part) * C + c, mask=c < C, other=0.0)
    tl.store(sums + c, tl.load(sums + c, mask=c < C, other=0.0) + total, mask=c < C)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that layer_norm_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 3}
    for f, C in product(("*fp32", "*bf16"), ("i32:16", "i32")):
        for residual, bias in product((f, None), (f, None)):
            types = {"y": f, "total": residual, "stats": "*fp32", "x": f, "residual": residual, "weight": f, "bias": bias}
            yield "layer_norm_forward", types | {"C": C, "eps": "fp32"}, {"BLOCK": BLOCK}, options
        for dtotal in (f, None):
            types = {"dx": f, "dy": f, "dtotal": dtotal, "x": f, "weight": f, "stats": "*fp32", "C": C}
            yield "layer_norm_backward_x", types, {"BLOCK": BLOCK}, options
        types = {"partial": "*fp32", "dy": f, "x": f, "stats": "*fp32", "R": "i32", "C": C}
        yield "layer_norm_backward_partial", types, {"ROWS": 32, "BLOCK": 256}, options
    types = {"sums": "*fp32", "partial": "*fp32", "part": "i32", "pieces": "i32", "C": "i32"}
    yield "layer_norm_backward_parameters", types, {"BLOCK": 256}, options
