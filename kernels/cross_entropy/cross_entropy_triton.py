"""Softmax cross-entropy in Triton. The contract is cross_entropy.h; logits are float32 or bfloat16, targets int32, the rest float32.

A program takes a row. Each lane keeps a maximum and a sum of its own (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3), so
that the lanes meet once, at the end; the gradient's pass finds the row in L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _finite(m):
    """What is subtracted: -inf - -inf would be nan."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _normaliser(logits, first, V, BLOCK: tl.constexpr):
    """Greatest logit and sum(exp(logits - greatest)); nan and +inf make the sum nan."""
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + first + c, mask=c < V, other=float("-inf")).to(tl.float32)
        most = tl.maximum(m, x)
        shift = _finite(most)
        s = s * tl.exp(m - shift) + tl.exp(x - shift)
        m = most
    greatest = tl.max(m, 0)
    return greatest, tl.sum(s * tl.exp(m - _finite(greatest)), 0)


@triton.jit
def cross_entropy_forward(loss, stats, dlogits, logits, targets, scale, V, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = row * V
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(stats + 2 * row, 0.0)
        tl.store(stats + 2 * row + 1, 0.0)
        if dlogits is not None:
            for start in range(0, V, BLOCK):
                c = start + tl.arange(0, BLOCK)
                tl.store(dlogits + first + c, tl.zeros([BLOCK], dlogits.dtype.element_ty), mask=c < V)
    else:
        # Read before any gradient is written: dlogits may be logits.
        known = (target >= 0) & (target < V)
        at_target = tl.load(logits + first + target, mask=known, other=float("nan")).to(tl.float32)
        most, total = _normaliser(logits, first, V, BLOCK)
        inverse = 1.0 / total
        tl.store(loss + row, tl.log(total) - (at_target - most))
        tl.store(stats + 2 * row, most)
        tl.store(stats + 2 * row + 1, inverse)
        if dlogits is not None:
            factor = tl.load(scale)
            for start in range(0, V, BLOCK):
                c = start + tl.arange(0, BLOCK)
                x = tl.load(logits + first + c, mask=c < V, other=float("-inf")).to(tl.float32)
                p = tl.exp(x - most) * inverse
                d = tl.where(c == target, p - 1.0, p) * factor
                tl.store(dlogits + first + c, d.to(dlogits.dtype.element_ty), mask=c < V)


@triton.jit
def cross_entropy_backward(dlogits, dy, logits, stats, targets, V, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = row * V
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(dlogits + first + c, tl.zeros([BLOCK], dlogits.dtype.element_ty), mask=c < V)
    else:
        x = tl.load(logits + first + c, mask=c < V, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - tl.load(stats + 2 * row)) * tl.load(stats + 2 * row + 1)
        d = tl.where(c == target, p - 1.0, p) * tl.load(dy + row)
        tl.store(dlogits + first + c, d.to(dlogits.dtype.element_ty), mask=c < V)


@triton.jit
def cross_entropy_narrow(narrow, targets, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(targets + at, mask=at < n, other=0)
    tl.store(narrow + at, tl.where(t == t.to(tl.int32), t, -2147483648).to(tl.int32), mask=at < n)


@triton.jit
def cross_entropy_scale(scale, targets, R, ignore_index, mean, BLOCK: tl.constexpr):
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        counts += (tl.load(targets + r, mask=r < R, other=ignore_index) != ignore_index).to(tl.int32)
    count = tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    tl.store(scale, 1.0 / tl.where(mean != 0, count, 1.0))


@triton.jit
def cross_entropy_total(total, loss, scale, R, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        sums += tl.load(loss + r, mask=r < R, other=0.0).to(tl.float64)
    tl.store(total, (tl.sum(sums, 0) * tl.load(scale).to(tl.float64)).to(tl.float32))


@triton.jit
def log_softmax(y, logits, V, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * V
    most, total = _normaliser(logits, first, V, BLOCK)
    log = tl.log(total)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + first + c, mask=c < V, other=0.0).to(tl.float32)
        tl.store(y + first + c, ((x - most) - log).to(y.dtype.element_ty), mask=c < V)


@triton.jit
def log_softmax_backward(dx, dy, y, V, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * V
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        sums += tl.load(dy + first + c, mask=c < V, other=0.0).to(tl.float32)
    total = tl.sum(sums, 0)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(y + first + c, mask=c < V, other=0.0).to(tl.float32))
        d = tl.load(dy + first + c, mask=c < V, other=0.0).to(tl.float32) - p * total
        tl.store(dx + first + c, d.to(dx.dtype.element_ty), mask=c < V)


@triton.jit
def scale_by(y, x, a, n, add, same, BLOCK: tl.constexpr):
    factor = tl.load(a)
    if (add != 0) | (same == 0) | (factor != 1.0):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * factor
        v += tl.load(y + at, mask=(at < n) & (add != 0), other=0.0).to(tl.float32)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=at < n)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that cross_entropy_gpu.py may ask for: kernel, types, constants, options."""
    wide, narrow = {"num_warps": 8, "num_stages": 3}, {"num_warps": 4, "num_stages": 3}
    row, small = {"BLOCK": BLOCK}, {"BLOCK": 1024}
    for f in ("*fp32", "*bf16"):
        for dlogits, V in ((f, "i32:16"), (f, "i32"), (None, "i32")):
            types = {"loss": "*fp32", "stats": "*fp32", "dlogits": dlogits, "logits": f, "targets": "*i32", "scale": "*fp32"}
            yield "cross_entropy_forward", types | {"V": V, "ignore_index": "i32"}, row, wide
        types = {"dlogits": f, "dy": "*fp32", "logits": f, "stats": "*fp32", "targets": "*i32", "V": "i32", "ignore_index": "i32"}
        yield "cross_entropy_backward", types, row, wide
        yield "log_softmax", {"y": f, "logits": f, "V": "i32"}, row, wide
        yield "log_softmax_backward", {"dx": f, "dy": f, "y": f, "V": "i32"}, row, wide
        yield "scale_by", {"y": f, "x": f, "a": "*fp32", "n": "i32", "add": "i32", "same": "i32"}, small, narrow
    yield "cross_entropy_narrow", {"narrow": "*i32", "targets": "*i64", "n": "i32"}, small, narrow
    types = {"scale": "*fp32", "targets": "*i32", "R": "i32", "ignore_index": "i32", "mean": "i32"}
    yield "cross_entropy_scale", types, small, narrow
    yield "cross_entropy_total", {"total": "*fp32", "loss": "*fp32", "scale": "*fp32", "R": "i32"}, small, narrow
