"""Layer normalization in Triton. The contract is layer_norm.h; arrays are float32 or bfloat16, statistics and sums float32.

A program keeps a row in registers where that has whole vectors and at most BLOCK columns; others are read again, in blocks of columns.
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
def _rstd(squares, rest, C, eps):
    """1 / sqrt(variance + eps); nan stays nan."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(squares / C - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps))


@triton.jit
def _write(y, weight, bias, first, c, inside, normal, biased):
    out = normal * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if biased:
        out += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + first + c, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_forward(y, total, stats, x, residual, weight, bias, fused, biased, C, eps, BLOCK: tl.constexpr, KEPT: tl.constexpr):
    """total and residual are not read or written unless `fused`, bias is not read unless `biased`."""
    first = tl.program_id(0).to(tl.int64) * C
    # A mean is rounded: `rest` is what it lacks.
    if KEPT:
        c = tl.arange(0, BLOCK)
        inside = c < C
        v = _row(x, residual, first + c, inside, fused)
        if fused:
            tl.store(total + first + c, v.to(total.dtype.element_ty), mask=inside)
        mean = tl.sum(v, 0) / C
        d = tl.where(inside, v - mean, 0.0)
        rest = tl.sum(d, 0) / C
        rstd = _rstd(tl.sum(d * d, 0), rest, C, eps)
        shift = -rest * rstd
        _write(y, weight, bias, first, c, inside, d * rstd + shift, biased)
    else:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = _row(x, residual, first + c, c < C, fused)
            if fused:
                tl.store(total + first + c, v.to(total.dtype.element_ty), mask=c < C)
            sums += v
        mean = tl.sum(sums, 0) / C
        rests = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            d = tl.where(c < C, _row(x, residual, first + c, c < C, fused) - mean, 0.0)
            rests += d
            squares += d * d
        rest = tl.sum(rests, 0) / C
        rstd = _rstd(tl.sum(squares, 0), rest, C, eps)
        shift = -rest * rstd
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            normal = (_row(x, residual, first + c, c < C, fused) - mean) * rstd + shift
            _write(y, weight, bias, first, c, c < C, normal, biased)
    at = stats + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, mean)
    tl.store(at + 1, shift)
    tl.store(at + 2, rstd)


@triton.jit
def layer_norm_backward(dx, partial, dy, dtotal, x, weight, stats, added, R, C, rows, BLOCK: tl.constexpr):
    """All gradients in one pass: a program takes a piece of `rows` rows, of at most BLOCK columns. partial (pieces, 2, C)."""
    piece = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(piece * rows, tl.minimum(R, piece * rows + rows)):
        first = tl.cast(row, tl.int64) * C
        at = stats + tl.cast(row, tl.int64) * 3
        mean, shift, rstd = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        d = tl.load(dy + first + c, mask=inside, other=0.0).to(tl.float32)
        normal = (tl.load(x + first + c, mask=inside, other=0.0).to(tl.float32) - mean) * rstd + shift
        g = d * w
        out = rstd * (g - (normal * (tl.sum(g * normal, 0) / C) + tl.sum(g, 0) / C))
        if added:
            out += tl.load(dtotal + first + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + first + c, out.to(dx.dtype.element_ty), mask=inside)
        dweight += d * normal
        dbias += d
    to = partial + 2 * piece.to(tl.int64) * C + c
    tl.store(to, dweight, mask=inside)
    tl.store(to + C, dbias, mask=inside)


@triton.jit
def layer_norm_backward_x(dx, dy, dtotal, x, weight, stats, added, C, BLOCK: tl.constexpr):
    """A program takes a row, in blocks of columns."""
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
        if added:
            d += tl.load(dtotal + first + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + first + c, d.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward_partial(partial, dy, x, stats, R, C, rows, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """partial (pieces, 2, C): a program sums a piece of `rows` rows for a block of columns, TILE rows at once."""
    piece = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros([TILE, BLOCK], tl.float32)
    dbias = tl.zeros([TILE, BLOCK], tl.float32)
    end = tl.minimum(R, piece * rows + rows)
    for start in range(piece * rows, end, TILE):
        row = (start + tl.arange(0, TILE)).to(tl.int64)
        inside = (row < end)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats + row * 3, mask=row < end, other=0.0)
        shift = tl.load(stats + row * 3 + 1, mask=row < end, other=0.0)
        rstd = tl.load(stats + row * 3 + 2, mask=row < end, other=0.0)
        dweight += d * ((v - mean[:, None]) * rstd[:, None] + shift[:, None])
        dbias += d
    to = partial + 2 * piece.to(tl.int64) * C + c
    tl.store(to, tl.sum(dweight, 0), mask=c < C)
    tl.store(to + C, tl.sum(dbias, 0), mask=c < C)


@triton.jit
def layer_norm_backward_parameters(sums, partial, part, pieces, C, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """sums (C,) += part 0 (of the weight) or 1 (of the bias) of the partial sums, TILE of them at once."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, pieces, TILE):
        piece = (start + tl.arange(0, TILE)).to(tl.int64)
        inside = (piece < pieces)[:, None] & (c < C)[None, :]
        total += tl.load(partial + (2 * piece + part)[:, None] * C + c[None, :], mask=inside, other=0.0)
    tl.store(sums + c, tl.load(sums + c, mask=c < C, other=0.0) + tl.sum(total, 0), mask=c < C)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that layer_norm_gpu.py may ask for: kernel, types, constants, options."""
    four = {"num_warps": 4, "num_stages": 3}
    for f in ("*fp32", "*bf16"):
        types = {
            "y": f,
            "total": f,
            "stats": "*fp32",
            "x": f,
            "residual": f,
            "weight": f,
            "bias": f,
            "fused": "i32",
            "biased": "i32",
        }
        added = {"dtotal": f, "x": f, "weight": f, "stats": "*fp32", "added": "i32"}
        all_ = {"dx": f, "partial": "*fp32", "dy": f} | added | {"R": "i32", "C": "i32:16", "rows": "i32"}
        for block, warps in ((1024, 4), (4096, 8)):
            options = {"num_warps": warps, "num_stages": 3}
            yield "layer_norm_forward", types | {"C": "i32:16", "eps": "fp32"}, {"BLOCK": block, "KEPT": True}, options
            yield "layer_norm_backward", all_, {"BLOCK": block}, options
        yield "layer_norm_forward", types | {"C": "i32", "eps": "fp32"}, {"BLOCK": 1024, "KEPT": False}, four
        yield "layer_norm_backward_x", {"dx": f, "dy": f} | added | {"C": "i32"}, {"BLOCK": 1024}, four
        types = {"partial": "*fp32", "dy": f, "x": f, "stats": "*fp32", "R": "i32", "C": "i32", "rows": "i32"}
        yield "layer_norm_backward_partial", types, {"TILE": 16, "BLOCK": 128}, four
    types = {"sums": "*fp32", "partial": "*fp32", "part": "i32", "pieces": "i32", "C": "i32"}
    yield "layer_norm_backward_parameters", types, {"TILE": 32, "BLOCK": 32}, four
