"""Sampling in Triton. The contract is sampling.h; logits are float32 or bfloat16, tokens int32, uniform numbers float64.

A program takes a row. Thresholds are found by bisection on the bits of floats: a pass over the row, from L2, counts what is above or
sums the mass below. Masses are whole multiples of 2^-44, so that their sums do not depend on the order. `weight` is compiled without
fused multiply-adds: its bits are the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _weight(x):
    """e^x for x <= 0, as sampling_cpu.cpp has it."""
    clamped = tl.maximum(x, -88.0)
    n = (clamped * 1.44269504 + 12582912.0) - 12582912.0  # to the nearest whole number, halves to the even one
    r = (clamped - n * 0.693145751953125) - n * 1.42860682e-6
    p = tl.full(r.shape, 1.38888889e-3, tl.float32)
    p = p * r + 8.33333333e-3
    p = p * r + 4.16666667e-2
    p = p * r + 1.66666667e-1
    p = p * r + 0.5
    p = ((p * r) * r + r) + 1.0
    scaled = (p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, scaled)


@triton.jit
def _key(z):
    """Whole numbers in the order of the floats."""
    i = z.to(tl.int32, bitcast=True)
    return i ^ ((i >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(e):
    return (e.to(tl.float64) * 17592186044416.0).to(tl.int64)


@triton.jit
def _scan(x, first, V, BLOCK: tl.constexpr):
    """The greatest value, and how many are nan."""
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + first + c, mask=c < V, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, v)
        bad += (v != v).to(tl.int32)
    return tl.max(most, 0), tl.sum(bad, 0)


@triton.jit
def _first(x, first, V, greatest, BLOCK: tl.constexpr):
    """The lowest index of the greatest value."""
    at = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + first + c, mask=c < V, other=float("-inf")).to(tl.float32)
        at = tl.minimum(at, tl.where((v == greatest) & (c < V), c, 0x7FFFFFFF))
    return tl.min(at, 0)


@triton.jit
def _kth(x, first, V, k, greatest, temperature, BLOCK: tl.constexpr):
    """The key of the k-th largest x / temperature."""
    low = tl.full([], -2139095041, tl.int64)  # the key of -inf
    high = _key(tl.div_rn(greatest, temperature)).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.div_rn(tl.load(x + first + c, mask=c < V, other=float("-inf")).to(tl.float32), temperature)
            counts += ((_key(z) >= middle) & (c < V)).to(tl.int32)
        enough = tl.sum(counts, 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _cut(row, first, V, limit, BLOCK: tl.constexpr):
    """The bits of the greatest t for which the mass of the weights below t stays within the limit, and that mass."""
    low = tl.full([], 0, tl.int32)
    high = tl.full([], 0x3F800001, tl.int32)  # after 1.0
    below = tl.full([], 0, tl.int64)
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        sums = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            e = tl.load(row + first + c, mask=c < V, other=0.0)
            sums += tl.where(e.to(tl.int32, bitcast=True) < middle, _mass(e), 0)
        mass = tl.sum(sums, 0)
        within = mass <= limit
        low = tl.where(within, middle, low)
        high = tl.where(within, high, middle)
        below = tl.where(within, mass, below)
    return low, below


@triton.jit
def _left(e, c, V, cut, dropped, tied, floor):
    """What the filters leave of a block's masses, and how many ties at the cut there were up to its end."""
    tie = (e.to(tl.int32, bitcast=True) == cut) & (c < V)
    rank = tied + tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
    stays = (e >= floor) & (e.to(tl.int32, bitcast=True) >= cut) & (c < V)
    mass = tl.where(stays & ~(tie & (rank < dropped)), _mass(e), 0)
    return mass, tied + tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _draw(row, first, V, uniform, cut, dropped, floor, BLOCK: tl.constexpr):
    """The first index, in order, whose cumulative mass exceeds uniform * the mass of all."""
    total = tl.full([], 0, tl.int64)
    tied = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mass, tied = _left(tl.load(row + first + c, mask=c < V, other=0.0), c, V, cut, dropped, tied, floor)
        total += tl.sum(mass, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    before = tl.full([], 0, tl.int64)
    tied = tl.full([], 0, tl.int32)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    start = tl.full([], 0, tl.int32)
    while (start < V) & (found == 0x7FFFFFFF):
        c = start + tl.arange(0, BLOCK)
        mass, tied = _left(tl.load(row + first + c, mask=c < V, other=0.0), c, V, cut, dropped, tied, floor)
        found = tl.min(tl.where(before + tl.cumsum(mass, 0) > target, c, 0x7FFFFFFF), 0)
        before += tl.sum(mass, 0)
        start += BLOCK
    return found


@triton.jit
def sample(
    token, row, logits, uniform, previous, begin, V, top_k, limit, rest, temperature, floor, BLOCK: tl.constexpr
):  # fmt: skip
    """row (B, V) float32: room. logits: after the repetition penalty; top_k 0: off; limit + rest = (1 - top_p) (1 + slack)."""
    b = tl.program_id(0).to(tl.int64)
    first = b * V
    u = tl.load(uniform + b)
    greatest, bad = _scan(logits, first, V, BLOCK)
    top = tl.div_rn(greatest, temperature)
    status = tl.where((top == float("inf")) | (top == float("-inf")), -3, 0)
    status = tl.where(temperature == 0.0, 0, status)
    status = tl.where((u >= 0) & (u < 1), status, -5)
    status = tl.where(greatest == float("-inf"), -2, status)
    status = tl.where(bad > 0, -1, status)
    if previous is not None:
        for i in range(tl.load(begin + b), tl.load(begin + b + 1)):
            id = tl.load(previous + i)
            status = tl.where((id < -1) | (id >= V), -4, status)
    if status < 0:
        tl.store(token + b, status)
    elif temperature == 0.0:
        tl.store(token + b, _first(logits, first, V, greatest, BLOCK))
    else:
        least = tl.full([], -2139095041, tl.int64)
        if top_k > 0:
            least = _kth(logits, first, V, top_k, greatest, temperature, BLOCK)
        sums = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            z = tl.div_rn(tl.load(logits + first + c, mask=c < V, other=float("-inf")).to(tl.float32), temperature)
            e = tl.where(_key(z) >= least, _weight(z - top), 0.0)
            tl.store(row + first + c, e, mask=c < V)
            sums += tl.where(c < V, _mass(e), 0)
        total = tl.sum(sums, 0)
        tl.debug_barrier()  # the row is read by other threads than those that wrote it
        cut = tl.full([], 0, tl.int32)
        dropped = tl.full([], 0, tl.int32)
        if limit > 0:
            most = (total.to(tl.float64) * limit + total.to(tl.float64) * rest).to(tl.int64)
            cut, below = _cut(row, first, V, most, BLOCK)
            ties = tl.zeros([BLOCK], tl.int32)
            for start in range(0, V, BLOCK):
                c = start + tl.arange(0, BLOCK)
                e = tl.load(row + first + c, mask=c < V, other=0.0)
                ties += ((e.to(tl.int32, bitcast=True) == cut) & (c < V)).to(tl.int32)
            # The last one always stays.
            spare = tl.sum(ties, 0) - (cut == 0x3F800000).to(tl.int32)
            each = _mass(cut.to(tl.float32, bitcast=True))
            dropped = tl.minimum((most - below) // each, spare.to(tl.int64)).to(tl.int32)
        tl.store(token + b, _draw(row, first, V, u, cut, dropped, floor, BLOCK))


@triton.jit
def sample_copy(y, x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0).to(tl.float32), mask=at < n)


@triton.jit
def sample_penalise(row, logits, previous, begin, V, penalty, BLOCK: tl.constexpr):
    """From the logits, not from the row: an id that occurs twice counts once."""
    b = tl.program_id(0).to(tl.int64)
    end = tl.load(begin + b + 1)
    for start in range(tl.load(begin + b), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        id = tl.load(previous + i, mask=i < end, other=-1)
        known = (id >= 0) & (id < V)
        x = tl.load(logits + b * V + id, mask=known, other=0.0).to(tl.float32)
        tl.store(row + b * V + id, tl.where(x < 0.0, x * penalty, tl.div_rn(x, penalty)), mask=known)


@triton.jit
def argmax(index, x, V, token, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    greatest, bad = _scan(x, r * V, V, BLOCK)
    if bad > 0:
        tl.store(index + r, -1)
    elif (token > 0) & (greatest == float("-inf")):
        tl.store(index + r, -2)
    else:
        tl.store(index + r, _first(x, r * V, V, greatest, BLOCK))


@triton.jit
def top_k(values, indices, x, V, k, BLOCK: tl.constexpr):
    """The k largest of a row of x and where they are, in k passes: each takes the greatest key below the last one's, a key being a value
    and, below it, how far its place is from the largest possible. A row with nan has the index -1 throughout."""
    row = tl.program_id(0).to(tl.int64)
    first = row * V
    _, bad = _scan(x, first, V, BLOCK)
    last = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for j in range(k):
        best = tl.full([BLOCK], -0x8000000000000000, tl.int64)
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = tl.load(x + first + c, mask=c < V, other=0.0).to(tl.float32)
            key = _key(tl.where(v == 0.0, 0.0, v)).to(tl.int64) << 32 | (0x7FFFFFFF - c).to(
                tl.int64
            )  # zeros of either sign are equal
            best = tl.maximum(best, tl.where((c < V) & (key < last), key, -0x8000000000000000))
        last = tl.max(best, 0)
        place = 0x7FFFFFFF - (last & 0x7FFFFFFF).to(tl.int32)
        tl.store(values + row * k + j, tl.load(x + first + place).to(tl.float32))
        tl.store(indices + row * k + j, tl.where(bad > 0, -1, place))


@triton.jit
def philox_uniforms(u, seeds, steps, B, BLOCK: tl.constexpr):
    """csrc/runtime/philox.h, row 0."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + b, mask=b < B, other=0)
    step = tl.load(steps + b, mask=b < B, other=0).to(tl.uint64, bitcast=True)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = tl.zeros([BLOCK], tl.uint32), tl.zeros([BLOCK], tl.uint32)
    c2, c3 = step.to(tl.uint32), (step >> 32).to(tl.uint32)
    first, second = tl.full([BLOCK], 0xD2511F53, tl.uint32), tl.full([BLOCK], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        n0, n2 = tl.umulhi(second, c2) ^ c1 ^ key0, tl.umulhi(first, c0) ^ c3 ^ key1
        c1, c3 = second * c2, first * c0
        c0, c2 = n0, n2
        key0, key1 = key0 + tl.full([BLOCK], 0x9E3779B9, tl.uint32), key1 + tl.full([BLOCK], 0xBB67AE85, tl.uint32)
    tl.store(u + b, ((c0 >> 5).to(tl.float64) * 67108864.0 + (c1 >> 6).to(tl.float64)) / 9007199254740992.0, mask=b < B)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """Every form that sampling_gpu.py may ask for: kernel, types, constants, options."""
    exact = {"enable_fp_fusion": False}
    for f, previous in (("*fp32", None), ("*fp32", "*i32"), ("*bf16", None)):
        types = {"token": "*i32", "row": "*fp32", "logits": f, "uniform": "*fp64", "previous": previous}
        types |= {"begin": None if previous is None else "*i64", "V": "i32", "top_k": "i32", "limit": "fp32", "rest": "fp32"}
        types |= {"temperature": "fp32", "floor": "fp32"}
        yield "sample", types, {"BLOCK": BLOCK}, {"num_warps": 16, "num_stages": 3} | exact
    for f in ("*fp32", "*bf16"):
        yield "sample_copy", {"y": "*fp32", "x": f, "n": "i32"}, {"BLOCK": BLOCK}, {"num_warps": 4, "num_stages": 3}
        types = {"row": "*fp32", "logits": f, "previous": "*i32", "begin": "*i64", "V": "i32", "penalty": "fp32"}
        yield "sample_penalise", types, {"BLOCK": 256}, {"num_warps": 4, "num_stages": 3}
        yield "argmax", {"index": "*i32", "x": f, "V": "i32", "token": "i32"}, {"BLOCK": BLOCK}, {"num_warps": 8, "num_stages": 3}
        types = {"values": "*fp32", "indices": "*i32", "x": f, "V": "i32", "k": "i32"}
        yield "top_k", types, {"BLOCK": 2048}, {"num_warps": 8, "num_stages": 3}
    types = {"u": "*fp64", "seeds": "*u64", "steps": "*i64", "B": "i32"}
    yield "philox_uniforms", types, {"BLOCK": 128}, {"num_warps": 4, "num_stages": 3} | exact
