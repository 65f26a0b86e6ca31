"""A mixture of experts around its products, in Triton. The contract is moe.h; rows are float32 or bfloat16, weights float32.

Everything is read from memory: counts, places and rows are those of this run. Nothing is scattered by several programs at once: an
expert's places are made by its own program, a row's sum by the row's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def moe_route(probabilities, experts, weights, logits, E, k, renormalise, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    x = tl.load(logits + row * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    z = tl.exp(x - tl.max(x, 0))
    p = tl.div_rn(z, tl.sum(z, 0) + tl.zeros([BLOCK], tl.float32))
    tl.store(probabilities + row * E + e, p, mask=e < E)
    free = tl.where(e < E, tl.where(p == p, p, -1.0), -2.0)  # nan comes last; an index is always one of an expert
    place = tl.full([BLOCK], -1, tl.int32)
    chosen = tl.full([], 0.0, tl.float32)
    for j in range(k):
        best = tl.min(tl.where(free == tl.max(free, 0), e, BLOCK), 0)
        place = tl.where(e == best, j, place)
        free = tl.where(e == best, -3.0, free)
        chosen += tl.sum(tl.where(e == best, p, 0.0), 0)
    chosen = tl.where(renormalise != 0, chosen, 1.0)
    tl.store(experts + row * k + place, e, mask=place >= 0)
    tl.store(weights + row * k + place, tl.div_rn(p, chosen + tl.zeros([BLOCK], tl.float32)), mask=place >= 0)


@triton.jit
def moe_route_backward(
    dlogits, dweights, dprobabilities, probabilities, experts, weights, E, k, renormalise, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    p = tl.load(probabilities + row * E + e, mask=e < E, other=0.0)
    dp = tl.load(dprobabilities + row * E + e, mask=e < E, other=0.0)
    total = tl.full([], 1.0, tl.float32)
    mean = tl.full([], 0.0, tl.float32)
    if renormalise != 0:
        total = tl.full([], 0.0, tl.float32)
        for j in range(k):
            total += tl.load(probabilities + row * E + tl.load(experts + row * k + j))
            mean += tl.load(dweights + row * k + j) * tl.load(weights + row * k + j)
    for j in range(k):
        dp += tl.where(e == tl.load(experts + row * k + j), (tl.load(dweights + row * k + j) - mean) / total, 0.0)
    d = p * (dp - tl.sum(dp * p, 0))
    tl.store(dlogits + row * E + e, d.to(dlogits.dtype.element_ty), mask=e < E)


@triton.jit
def moe_kept(slots, counts, experts, R, k, groups, capacity, BLOCK: tl.constexpr):
    """An expert's program: slots 0 for its choices that find room, -1 for the others; how many these are."""
    expert = tl.program_id(0)
    rows = R // tl.maximum(groups, 1)
    count = tl.full([], 0, tl.int64)
    for group in range(groups):
        used = tl.full([], 0, tl.int32)
        for j in range(k):
            for start in range(0, rows, BLOCK):
                r = start + tl.arange(0, BLOCK)
                at = (group * rows + r).to(tl.int64) * k + j
                mine = tl.load(experts + at, mask=r < rows, other=-1) == expert
                number = used + tl.cumsum(mine.to(tl.int32), 0)
                kept = mine & ((capacity == 0) | (number <= capacity))
                tl.store(slots + at, tl.where(kept, 0, -1), mask=mine)
                used += tl.sum(mine.to(tl.int32), 0)
                count += tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + expert, count)


@triton.jit
def moe_places(slots, rows, counts, experts, n, k, E, BLOCK: tl.constexpr):
    """An expert's program numbers its choices, in their order; the last program fills up what is behind all places."""
    expert = tl.program_id(0)
    place = tl.full([], 0, tl.int64)
    for before in range(expert):
        place += tl.load(counts + before)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        theirs = tl.load(experts + i, mask=i < n, other=0)
        if expert < E:
            mine = (theirs == expert) & (i < n)
            mine = mine & (tl.load(slots + i, mask=mine, other=-1) == 0)
            at = place + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(slots + i, at.to(tl.int32), mask=mine)
            tl.store(rows + at, i // k, mask=mine)
            place += tl.sum(mine.to(tl.int32), 0)
        else:
            tl.store(slots + i, tl.full([BLOCK], -1, tl.int32), mask=(i < n) & ((theirs < 0) | (theirs >= E)))
            tl.store(rows + i, tl.zeros([BLOCK], tl.int32), mask=(i < n) & (i >= place))


@triton.jit
def moe_gather(y, x, rows, C, R, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + place).to(tl.int64)
    v = tl.load(x + row * C + c, mask=(c < C) & (row >= 0) & (row < R), other=0.0)
    tl.store(y + place * C + c, v, mask=c < C)


@triton.jit
def moe_combine(out, y, slots, weights, residual, C, k, P, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(k):
        slot = tl.load(slots + row * k + j).to(tl.int64)
        v = tl.load(y + slot * C + c, mask=(c < C) & (slot >= 0) & (slot < P), other=0.0).to(tl.float32)
        if weights is not None:
            v = tl.where(slot >= 0, v * tl.load(weights + row * k + j), 0.0)
        total += v
    if residual is not None:
        total += tl.load(residual + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def moe_combine_backward(dy, dweights, dout, y, slots, weights, C, k, P, BLOCK: tl.constexpr):
    choice = tl.program_id(0).to(tl.int64)
    row, slot = choice // k, tl.load(slots + choice).to(tl.int64)
    if (slot >= 0) & (slot < P):
        weight = tl.load(weights + choice)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            d = tl.load(dout + row * C + c, mask=c < C, other=0.0).to(tl.float32)
            sums += d * tl.load(y + slot * C + c, mask=c < C, other=0.0).to(tl.float32)
            tl.store(dy + slot * C + c, (weight * d).to(dy.dtype.element_ty), mask=c < C)
        tl.store(dweights + choice, tl.sum(sums, 0))
    else:
        tl.store(dweights + choice, 0.0)


@triton.jit
def moe_load(load, experts, rows, k, first, E, scale, add, BLOCK: tl.constexpr):
    """load (groups, E) = or += scale times how often an expert is among the first choices of its group's rows."""
    group, expert = tl.program_id(0) // E, tl.program_id(0) % E
    count = tl.full([], 0, tl.int64)
    for start in range(0, rows * first, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = (group * rows + i // first).to(tl.int64) * k + i % first
        count += tl.sum((tl.load(experts + at, mask=i < rows * first, other=-1) == expert).to(tl.int32), 0)
    share = count.to(tl.float32) * scale
    if add != 0:
        share += tl.load(load + tl.program_id(0))
    tl.store(load + tl.program_id(0), share)


@triton.jit
def moe_balance(partial, probabilities, load, first, n, E, rows, BLOCK: tl.constexpr):
    """partial[first + piece] = the sum of p * load over BLOCK of the n probabilities (R, E); `rows` of them are a group."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    each = tl.load(load + i // E // rows * E + i % E, mask=i < n, other=0.0)
    tl.store(partial + first + tl.program_id(0), tl.sum(tl.load(probabilities + i, mask=i < n, other=0.0) * each, 0))


@triton.jit
def moe_balance_backward(dprobabilities, dy, load, n, E, rows, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    each = tl.load(load + i // E // rows * E + i % E, mask=i < n, other=0.0)
    tl.store(dprobabilities + i, tl.load(dy) * each, mask=i < n)


@triton.jit
def moe_z(logs, squares, logits, first, E, scale, BLOCK: tl.constexpr):
    """logs[first + row] = log(sum(exp(logits))), squares[first + row] = scale times its square."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    x = tl.load(logits + row * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    log = top + tl.log(tl.sum(tl.exp(x - top), 0))
    tl.store(logs + first + row, log)
    tl.store(squares + first + row, log * log * scale)


@triton.jit
def moe_z_backward(dlogits, dy, logs, probabilities, first, n, E, scale, BLOCK: tl.constexpr):
    """dlogits (R, E), of n elements, = dy scale 2 log p."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    log = tl.load(logs + first + i // E, mask=i < n, other=0.0)
    d = tl.load(dy) * (2.0 * scale) * log * tl.load(probabilities + i, mask=i < n, other=0.0)
    tl.store(dlogits + i, d.to(dlogits.dtype.element_ty), mask=i < n)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that moe_gpu.py may ask for: kernel, types, constants, options."""
    options, block = {"num_warps": 4, "num_stages": 3}, {"BLOCK": 1024}
    w, i = "*fp32", "*i32"
    sizes = {"E": "i32", "k": "i32", "renormalise": "i32"}
    for f in ("*fp32", "*bf16"):
        for B, warps in ((64, 1), (1024, 8)):
            types = {"probabilities": w, "experts": i, "weights": w, "logits": f}
            yield "moe_route", types | sizes, {"BLOCK": B}, options | {"num_warps": warps}
            types = {"dlogits": f, "dweights": w, "dprobabilities": w, "probabilities": w, "experts": i, "weights": w}
            yield "moe_route_backward", types | sizes, {"BLOCK": B}, options | {"num_warps": warps}
        for C in ("i32", "i32:16"):
            yield "moe_gather", {"y": f, "x": f, "rows": i, "C": C, "R": "i32"}, block, options
        for weights, residual in ((w, f), (w, None), (None, None)):
            types = {"out": f, "y": f, "slots": i, "weights": weights, "residual": residual, "C": "i32", "k": "i32", "P": "i32"}
            yield "moe_combine", types, block, options
        types = {"dy": f, "dweights": w, "dout": f, "y": f, "slots": i, "weights": w, "C": "i32", "k": "i32", "P": "i32"}
        yield "moe_combine_backward", types, block, options
    types = {"slots": i, "counts": "*i64", "experts": i, "R": "i32", "k": "i32", "groups": "i32", "capacity": "i32"}
    yield "moe_kept", types, block, options
    types = {"slots": i, "rows": i, "counts": "*i64", "experts": i, "n": "i32", "k": "i32", "E": "i32"}
    yield "moe_places", types, block, options
    types = {"load": w, "experts": i, "rows": "i32", "k": "i32", "first": "i32", "E": "i32", "scale": "fp32", "add": "i32"}
    yield "moe_load", types, block, options
    pieces = {"n": "i32", "E": "i32", "rows": "i32"}
    yield "moe_balance", {"partial": w, "probabilities": w, "load": w, "first": "i32"} | pieces, block, options
    yield "moe_balance_backward", {"dprobabilities": w, "dy": w, "load": w} | pieces, block, options
    for f in ("*fp32", "*bf16"):
        for B, warps in ((64, 1), (1024, 8)):
            types = {"logs": w, "squares": w, "logits": f, "first": "i32", "E": "i32", "scale": "fp32"}
            yield "moe_z", types, {"BLOCK": B}, options | {"num_warps": warps}
        types = {"dlogits": f, "dy": w, "logs": w, "probabilities": w, "first": "i32", "n": "i32", "E": "i32", "scale": "fp32"}
        yield "moe_z_backward", types, block, options
