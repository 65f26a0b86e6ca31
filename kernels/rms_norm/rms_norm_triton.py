"""RMS normalization in Triton. The contract is rms_norm.h; arrays are float32 or bfloat16, rstd and sums float32.

A program keeps a row in registers where that has whole vectors and at most BLOCK columns; others are read twice, in blocks of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _row(x, residual, at, inside, fused):
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if fused:
        v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def rms_norm_forward(y, total, rstd, x, residual, weight, fused, C, eps, BLOCK: tl.constexpr, KEPT: tl.constexpr):
    """total and residual are not read or written unless `fused`."""
    first = tl.program_id(0).to(tl.int64) * C
    if KEPT:
        c = tl.arange(0, BLOCK)
        v = _row(x, residual, first + c, c < C, fused)
        if fused:
            tl.store(total + first + c, v.to(total.dtype.element_ty), mask=c < C)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, 0) / C + eps))
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(y + first + c, (v * scale * w).to(y.dtype.element_ty), mask=c < C)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = _row(x, residual, first + c, c < C, fused)
            if fused:
                tl.store(total + first + c, v.to(total.dtype.element_ty), mask=c < C)
            squares += v * v
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / C + eps))
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = _row(x, residual, first + c, c < C, fused)
            w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
            tl.store(y + first + c, (v * scale * w).to(y.dtype.element_ty), mask=c < C)
    tl.store(rstd + tl.program_id(0), scale)


@triton.jit
def rms_norm_backward(dx, partial, dy, dtotal, x, weight, rstd, added, R, C, rows, BLOCK: tl.constexpr):
    """Both gradients in one pass: a program takes a piece of `rows` rows, of at most BLOCK columns. partial (pieces, C)."""
    piece = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for row in range(piece * rows, tl.minimum(R, piece * rows + rows)):
        first = tl.cast(row, tl.int64) * C
        scale = tl.load(rstd + row)
        d = tl.load(dy + first + c, mask=inside, other=0.0).to(tl.float32)
        normal = tl.load(x + first + c, mask=inside, other=0.0).to(tl.float32) * scale
        g = d * w
        out = scale * (g - normal * (tl.sum(g * normal, 0) / C))
        if added:
            out += tl.load(dtotal + first + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + first + c, out.to(dx.dtype.element_ty), mask=inside)
        sums += d * normal
    tl.store(partial + piece.to(tl.int64) * C + c, sums, mask=inside)


@triton.jit
def rms_norm_backward_x(dx, dy, dtotal, x, weight, rstd, added, C, BLOCK: tl.constexpr):
    """A program takes a row, in blocks of columns."""
    first = tl.program_id(0).to(tl.int64) * C
    scale = tl.load(rstd + tl.program_id(0))
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        g = tl.load(dy + first + c, mask=c < C, other=0.0).to(tl.float32)
        g *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        sums += g * (tl.load(x + first + c, mask=c < C, other=0.0).to(tl.float32) * scale)
    mean = tl.sum(sums, 0) / C
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        g = tl.load(dy + first + c, mask=c < C, other=0.0).to(tl.float32)
        g *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        out = scale * (g - tl.load(x + first + c, mask=c < C, other=0.0).to(tl.float32) * scale * mean)
        if added:
            out += tl.load(dtotal + first + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(dx + first + c, out.to(dx.dtype.element_ty), mask=c < C)


@triton.jit
def rms_norm_backward_partial(partial, dy, x, rstd, R, C, rows, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """partial (pieces, C): a program sums a piece of `rows` rows for a block of columns, TILE rows at once."""
    piece = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([TILE, BLOCK], tl.float32)
    end = tl.minimum(R, piece * rows + rows)
    for start in range(piece * rows, end, TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < end)[:, None] & (c < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        sums += d * (v * tl.load(rstd + row, mask=row < end, other=0.0)[:, None])
    tl.store(partial + piece.to(tl.int64) * C + c, tl.sum(sums, 0), mask=c < C)


@triton.jit
def rms_norm_backward_parameters(dweight, partial, pieces, C, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """dweight (C,) += the partial sums, TILE of them at once."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, pieces, TILE):
        piece = start + tl.arange(0, TILE)
        inside = (piece < pieces)[:, None] & (c < C)[None, :]
        sums += tl.load(partial + piece.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)
    tl.store(dweight + c, tl.load(dweight + c, mask=c < C, other=0.0) + tl.sum(sums, 0), mask=c < C)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that rms_norm_gpu.py may ask for: kernel, types, constants, options."""
    four = {"num_warps": 4, "num_stages": 3}
    for f in ("*fp32", "*bf16"):
        types = {"y": f, "total": f, "rstd": "*fp32", "x": f, "residual": f, "weight": f, "fused": "i32"}
        added = {"dtotal": f, "x": f, "weight": f, "rstd": "*fp32", "added": "i32"}
        both = {"dx": f, "partial": "*fp32", "dy": f} | added | {"R": "i32", "C": "i32:16", "rows": "i32"}
        for block, warps in ((1024, 4), (4096, 8)):
            options = {"num_warps": warps, "num_stages": 3}
            yield "rms_norm_forward", types | {"C": "i32:16", "eps": "fp32"}, {"BLOCK": block, "KEPT": True}, options
            yield "rms_norm_backward", both, {"BLOCK": block}, options
        yield "rms_norm_forward", types | {"C": "i32", "eps": "fp32"}, {"BLOCK": 1024, "KEPT": False}, four
        yield "rms_norm_backward_x", {"dx": f, "dy": f} | added | {"C": "i32"}, {"BLOCK": 1024}, four
        types = {"partial": "*fp32", "dy": f, "x": f, "rstd": "*fp32", "R": "i32", "C": "i32", "rows": "i32"}
        yield "rms_norm_backward_partial", types, {"TILE": 16, "BLOCK": 128}, four
    types = {"dweight": "*fp32", "partial": "*fp32", "pieces": "i32", "C": "i32"}
    yield "rms_norm_backward_parameters", types, {"TILE": 32, "BLOCK": 32}, four
