"""Position and segment scores of Transformer-XL in Triton. The contract is rel_shift.h; arrays are float32 or bfloat16, but for the
scores' gradient, which attention gives in float32.

A program multiplies ROWS queries with POINTS neighbouring rows of r on the tensor cores; the shift is in the addresses of the scores,
s = p - start. Tiles that no query of the program sees are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _queries(q, u, t, T, H, D, c):
    """q + u, (ROWS, columns), for queries t of a head, which q and u point to."""
    inside = (t < T)[:, None] & (c < D)[None, :]
    x = tl.load(q + (t[:, None] * (H * D) + c[None, :]), mask=inside, other=0.0).to(tl.float32)
    x += tl.load(u + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, x, 0.0)


@triton.jit
def _starts(starts, b, t, T):
    """Starts of queries t, and the least and the greatest of them."""
    start = tl.load(starts + b * T + t, mask=t < T, other=0)
    low = tl.min(tl.where(t < T, start, 0x7FFFFFFF), 0)
    return start, low, tl.max(tl.where(t < T, start, -1), 0)


@triton.jit
def _same(query_segments, key_segments, b, t, s, inside, T, S):
    """Whether query and key are of one segment."""
    one = tl.load(query_segments + b * T + t, mask=t < T, other=0)
    return one[:, None] == tl.load(key_segments + b * S + s, mask=inside, other=0)


@triton.jit
def rel_shift_forward(
    out,
    q,
    u,
    r,
    starts,
    segment,
    query_segments,
    key_segments,
    mask,
    T,
    H,
    D,
    S,
    P,
    segmented,
    masked,
    scale,
    ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """segment and the two after it are read if `segmented`, mask if `masked`."""
    tiles = tl.cdiv(T, ROWS)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    t = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    start, low, high = _starts(starts, b, t, T)
    first = tl.program_id(1) * POINTS
    if (first + POINTS > low) & (first < high + S):
        p = first + tl.arange(0, POINTS)
        scores = tl.zeros([ROWS, POINTS], tl.float32)
        for begin in range(0, D, COLUMNS):
            c = begin + tl.arange(0, COLUMNS)
            x = _queries(q + (b * T * H + h) * D, u + h * D, t, T, H, D, c).to(r.dtype.element_ty)
            at = p[None, :] * (H * D) + c[:, None]
            y = tl.load(r + h * D + at, mask=(p < P)[None, :] & (c < D)[:, None], other=0.0)
            scores = tl.dot(x, y, scores, input_precision="ieee")
        scores *= scale
        s = p[None, :] - start[:, None]
        inside = (t < T)[:, None] & (s >= 0) & (s < S) & (p < P)[None, :]
        if segmented:
            term = segment + bh * T * 2 + t * 2
            same = _same(query_segments, key_segments, b, t, s, inside, T, S)
            equal, other = tl.load(term, mask=t < T, other=0.0), tl.load(term + 1, mask=t < T, other=0.0)
            scores += tl.where(same, equal[:, None], other[:, None])
        if masked:
            scores += tl.load(mask + b * T * S + (t[:, None] * S + s), mask=inside, other=0.0)
        tl.store(out + bh * T * S + (t[:, None] * S + s), scores.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rel_shift_backward_q(
    dq,
    dterm,
    dout,
    r,
    starts,
    query_segments,
    key_segments,
    T,
    H,
    D,
    S,
    P,
    segmented,
    scale,
    ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dq (B, T, H, D) of the position scores; if `segmented` dterm (B, H, T, 2), sums over the keys of one segment and of the other."""
    tiles = tl.cdiv(T, ROWS)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    t = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, low, high = _starts(starts, b, t, T)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    equal = tl.zeros([ROWS], tl.float32)
    other = tl.zeros([ROWS], tl.float32)
    for first in range(low // POINTS * POINTS, tl.minimum(high + S, P), POINTS):
        p = first + tl.arange(0, POINTS)
        s = p[None, :] - start[:, None]
        inside = (t < T)[:, None] & (s >= 0) & (s < S) & (p < P)[None, :]
        g = tl.load(dout + bh * T * S + (t[:, None] * S + s), mask=inside, other=0.0)
        at = p[:, None] * (H * D) + c[None, :]
        y = tl.load(r + h * D + at, mask=(p < P)[:, None] & (c < D)[None, :], other=0.0)
        sums = tl.dot(g.to(y.dtype), y, sums, input_precision="ieee")
        if segmented:
            same = _same(query_segments, key_segments, b, t, s, inside, T, S)
            equal += tl.sum(tl.where(same, g, 0.0), 1)
            other += tl.sum(tl.where(same, 0.0, g), 1)
    at = t[:, None] * (H * D) + c[None, :]
    tl.store(dq + (b * T * H + h) * D + at, (sums * scale).to(dq.dtype.element_ty), mask=(t < T)[:, None] & (c < D)[None, :])
    if segmented != 0 and tl.program_id(1) == 0:
        to = dterm + bh * T * 2 + t * 2
        tl.store(to, equal, mask=t < T)
        tl.store(to + 1, other, mask=t < T)


@triton.jit
def rel_shift_backward_r(
    dr, dout, q, u, starts, B, T, H, D, S, P, scale, ROWS: tl.constexpr, POINTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dr (P, H, D): sums over b and t in this order."""
    blocks = tl.cdiv(P, POINTS)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * POINTS
    p = first + tl.arange(0, POINTS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([POINTS, COLUMNS], tl.float32)
    for sequence in range(B):
        b = tl.cast(sequence, tl.int64)
        for begin in range(0, T, ROWS):
            t = begin + tl.arange(0, ROWS)
            start, low, high = _starts(starts, b, t, T)
            if (first + POINTS > low) & (first < high + S):
                s = p[:, None] - start[None, :]
                inside = (t < T)[None, :] & (s >= 0) & (s < S)
                g = tl.load(dout + (b * H + h) * T * S + (t[None, :] * S + s), mask=inside, other=0.0)
                x = _queries(q + (b * T * H + h) * D, u + h * D, t, T, H, D, c).to(q.dtype.element_ty)
                sums = tl.dot(g.to(x.dtype), x, sums, input_precision="ieee")
    at = p[:, None] * (H * D) + c[None, :]
    tl.store(dr + h * D + at, (sums * scale).to(dr.dtype.element_ty), mask=(p < P)[:, None] & (c < D)[None, :])


@triton.jit
def rel_shift_term(term, q, bias, embedding, rows, T, H, D, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """term (B, H, T, 2) = scale (q + bias) . embedding (2, H, D); a program takes ROWS of all B T queries, of one head."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    h = tl.program_id(1)
    equal = tl.zeros([ROWS], tl.float32)
    other = tl.zeros([ROWS], tl.float32)
    for begin in range(0, D, COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        x = _queries(q + h * D, bias + h * D, row, rows, H, D, c)
        equal += tl.sum(x * tl.load(embedding + h * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :], 1)
        other += tl.sum(x * tl.load(embedding + (H + h) * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :], 1)
    to = term + ((row // T * H + h) * T + row % T) * 2
    tl.store(to, equal * scale, mask=row < rows)
    tl.store(to + 1, other * scale, mask=row < rows)


@triton.jit
def rel_shift_backward_term(
    dq, partial, dterm, q, bias, embedding, rows, T, H, D, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dq += the segment term's; partial (pieces, 3, H, D): sums over ROWS queries for both embeddings and for the bias."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    h = tl.program_id(1)
    c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    from_ = dterm + ((row // T * H + h) * T + row % T) * 2
    equal = tl.load(from_, mask=row < rows, other=0.0)[:, None] * scale
    other = tl.load(from_ + 1, mask=row < rows, other=0.0)[:, None] * scale
    x = _queries(q + h * D, bias + h * D, row, rows, H, D, c)
    more = equal * tl.load(embedding + h * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    more += other * tl.load(embedding + (H + h) * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    at = (row[:, None] * H + h) * D + c[None, :]
    inside = (row < rows)[:, None] & (c < D)[None, :]
    tl.store(dq + at, (tl.load(dq + at, mask=inside, other=0.0).to(tl.float32) + more).to(dq.dtype.element_ty), mask=inside)
    to = partial + (tl.program_id(0).to(tl.int64) * 3 * H + h) * D + c
    tl.store(to, tl.sum(equal * x, 0), mask=c < D)
    tl.store(to + H * D, tl.sum(other * x, 0), mask=c < D)
    tl.store(to + 2 * H * D, tl.sum(more, 0), mask=c < D)


@triton.jit
def rel_shift_sum(sums, x, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums (C,) of the rows of x (R, C), ROWS at once."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, R, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        total += tl.load(x + row[:, None] * C + c[None, :], mask=(row < R)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    tl.store(sums + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def rel_shift_narrow(to, x, N, BLOCK: tl.constexpr):
    """int64 as int32: numbers of segments."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + i, tl.load(x + i, mask=i < N, other=0).to(tl.int32), mask=i < N)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that rel_shift_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 1}
    tile, rows = {"ROWS": 32, "POINTS": 32, "COLUMNS": 64}, {"ROWS": 32, "COLUMNS": 64}
    F = "*fp32"
    sizes: dict[str, str | None] = dict.fromkeys(("T", "H", "D", "S", "P"), "i32")
    yield "rel_shift_narrow", {"to": "*i32", "x": "*i64", "N": "i32"}, {"BLOCK": 1024}, options
    for f in (F, "*bf16"):
        types: dict[str, str | None] = {"out": f, "q": f, "u": f, "r": f, "starts": "*i32", "segment": F}
        types |= {"query_segments": "*i32", "key_segments": "*i32", "mask": F} | sizes
        yield (
            "rel_shift_forward",
            types | {"segmented": "i32", "masked": "i32", "scale": "fp32"},
            {"ROWS": 32, "POINTS": 64, "COLUMNS": 32},
            options,
        )
        types = {"dq": f, "dterm": F, "dout": F, "r": f, "starts": "*i32", "query_segments": "*i32", "key_segments": "*i32"} | sizes
        yield "rel_shift_backward_q", types | {"segmented": "i32", "scale": "fp32"}, tile, options
        types = {"dr": f, "dout": F, "q": f, "u": f, "starts": "*i32", "B": "i32"} | sizes | {"scale": "fp32"}
        yield "rel_shift_backward_r", types, tile | {"ROWS": 16}, options
        some: dict[str, str | None] = {"rows": "i32", "T": "i32", "H": "i32", "D": "i32", "scale": "fp32"}
        yield "rel_shift_term", {"term": F, "q": f, "bias": f, "embedding": f} | some, rows, options
        types = {"dq": f, "partial": F, "dterm": F, "q": f, "bias": f, "embedding": f} | some
        yield "rel_shift_backward_term", types, rows, options
        yield "rel_shift_sum", {"sums": F, "x": f, "R": "i32", "C": "i32"}, {"ROWS": 32, "COLUMNS": 32}, options
