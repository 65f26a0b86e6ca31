"""Losses against a teacher in Triton: a program takes a row. x, target and dx are float32 or bfloat16, losses float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _seen(v, top, sum):
    """The greatest number so far and the sum of e^(v - top), with another block of a row; -inf is a token that cannot occur."""
    new = tl.maximum(top, tl.max(v, 0))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, sum * tl.exp(top - base) + tl.sum(tl.exp(v - base), 0)


@triton.jit
def kl_divergence(loss, dx, x, target, V, inverse, factor, wanted, BLOCK: tl.constexpr):
    """loss (R,) of rows over V; if `wanted` dx = factor (softmax(x inverse) - softmax(target inverse))."""
    first = tl.program_id(0).to(tl.int64) * V
    top = -float("inf")
    sum = 0.0
    there = -float("inf")
    all = 0.0
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + first + c, mask=c < V, other=-float("inf")).to(tl.float32) * inverse
        top, sum = _seen(v, top, sum)
        v = tl.load(target + first + c, mask=c < V, other=-float("inf")).to(tl.float32) * inverse
        there, all = _seen(v, there, all)
    ours, theirs = top + tl.log(sum), there + tl.log(all)
    losses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        q = tl.load(x + first + c, mask=c < V, other=0.0).to(tl.float32) * inverse - ours
        p = tl.load(target + first + c, mask=c < V, other=-float("inf")).to(tl.float32) * inverse - theirs
        e = tl.exp(p)
        losses += tl.where((e == 0) | (c >= V), 0.0, e * (p - q))
        if wanted:
            tl.store(dx + first + c, (factor * (tl.exp(q) - e)).to(dx.dtype.element_ty), mask=c < V)
    tl.store(loss + tl.program_id(0), tl.sum(losses, 0))


@triton.jit
def cosine_distance(loss, dx, x, target, C, factor, wanted, BLOCK: tl.constexpr):
    """loss (R,) = 1 - cos; if `wanted` dx = factor times its gradient."""
    first = tl.program_id(0).to(tl.int64) * C
    aa = tl.zeros([BLOCK], tl.float32)
    bb = tl.zeros([BLOCK], tl.float32)
    ab = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        a = tl.load(x + first + c, mask=c < C, other=0.0).to(tl.float32)
        b = tl.load(target + first + c, mask=c < C, other=0.0).to(tl.float32)
        aa += a * a
        bb += b * b
        ab += a * b
    square = tl.sum(aa, 0) + 1e-12
    length = tl.sqrt_rn(square) * tl.sqrt_rn(tl.sum(bb, 0) + 1e-12)
    cosine = tl.div_rn(tl.sum(ab, 0), length)
    tl.store(loss + tl.program_id(0), 1.0 - cosine)
    if wanted:
        along, across = factor * tl.div_rn(cosine, square), tl.div_rn(factor, length)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            a = tl.load(x + first + c, mask=c < C, other=0.0).to(tl.float32)
            b = tl.load(target + first + c, mask=c < C, other=0.0).to(tl.float32)
            tl.store(dx + first + c, (along * a - across * b).to(dx.dtype.element_ty), mask=c < C)


@triton.jit
def distillation_total(total, loss, R, scale, BLOCK: tl.constexpr):
    """total () = scale times the sum of loss (R,)."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, R, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(loss + i, mask=i < R, other=0.0)
    tl.store(total, tl.sum(sums, 0) * scale)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that distillation_gpu.py may ask for: kernel, types, constants, options."""
    for f in ("*fp32", "*bf16"):
        types: dict[str, str | None] = {"loss": "*fp32", "dx": f, "x": f, "target": f}
        more = {"V": "i32", "inverse": "fp32", "factor": "fp32", "wanted": "i32"}
        yield "kl_divergence", types | more, {"BLOCK": 4096}, {"num_warps": 8, "num_stages": 3}
        more = {"C": "i32", "factor": "fp32", "wanted": "i32"}
        yield "cosine_distance", types | more, {"BLOCK": 1024}, {"num_warps": 4, "num_stages": 3}
    types = {"total": "*fp32", "loss": "*fp32", "R": "i32", "scale": "fp32"}
    yield "distillation_total", types, {"BLOCK": 1024}, {"num_warps": 4, "num_stages": 3}
