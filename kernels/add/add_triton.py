"""Sums and multiples of arrays in Triton: what NumPy does on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

BLOCK = 1024
OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit
def add(out, x, y, n, period, BLOCK: tl.constexpr):
    """out (n,) = x (n,) + y (period,), repeated."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) + tl.load(y + at % period, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def scale_add(y, x, z, n, a, BLOCK: tl.constexpr):
    """y (n,) = a x (n,) + z (n,); z may be None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * a
    if z is not None:
        sum += tl.load(z + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y + at, sum.to(y.dtype.element_ty), mask=at < n)


@triton.jit
def tanh(y, x, n, BLOCK: tl.constexpr):
    """y (n,) = tanh(x) (n,), by exp of what is not positive: nothing overflows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    e = tl.exp(-2.0 * tl.abs(v))
    # Near 0 the difference 1 - e would lose digits; there the series has all of them.
    s = v * v
    series = 62.0 / 2835 - s * (1382.0 / 155925 - s * (21844.0 / 6081075))
    small = v * (1.0 - s * (1.0 / 3 - s * (2.0 / 15 - s * (17.0 / 315 - s * series))))
    large = (1.0 - e) / (1.0 + e)
    t = tl.where(tl.abs(v) < 0.35, small, tl.where(v < 0, -large, large))
    tl.store(y + at, t.to(y.dtype.element_ty), mask=at < n)


@triton.jit
def tanh_backward(dx, dy, y, n, BLOCK: tl.constexpr):
    """dx (n,) = dy (1 - y^2); dx may be dy."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(y + at, mask=at < n, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(dx + at, (d * (1.0 - t * t)).to(dx.dtype.element_ty), mask=at < n)


@triton.jit
def advance(y, x, n, by, BLOCK: tl.constexpr):
    """y (n,) = x (n,) + by, of whole numbers; y may be x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0) + by, mask=at < n)


@triton.jit
def add_broadcast(out, x, y, n, D1, D2, D3, x0, x1, x2, x3, y0, y1, y2, y3, BLOCK: tl.constexpr):
    """out (D0, D1, D2, D3), of n elements, = x + y, which have these strides in elements: 0 where they are repeated."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d3, rest = at % D3, at // D3
    d2, rest = rest % D2, rest // D2
    d1, d0 = rest % D1, rest // D1
    a = tl.load(x + d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3, mask=at < n, other=0.0).to(tl.float32)
    b = tl.load(y + d0 * y0 + d1 * y1 + d2 * y2 + d3 * y3, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, (a + b).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def sum_to(out, x, n, pieces, K1, K2, K3, k0, k1, k2, k3, count, R1, R2, R3, r0, r1, r2, r3, BLOCK: tl.constexpr):
    """out (pieces, K0, K1, K2, K3), of `pieces` times n elements: x summed over (R0, R1, R2, R3), of `count`, in their order; a piece
    takes every pieces-th of them. Strides of x in elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, piece, place = at < n.to(tl.int64) * pieces, at // n, at % n
    d3, rest = place % K3, place // K3
    d2, rest = rest % K2, rest // K2
    d1, d0 = rest % K1, rest // K1
    first = x + d0 * k0 + d1 * k1 + d2 * k2 + d3 * k3
    sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count, pieces):
        j = i + piece
        e3, rest_ = j % R3, j // R3
        e2, rest_ = rest_ % R2, rest_ // R2
        e1, e0 = rest_ % R1, rest_ // R1
        sum += tl.load(first + (e0 * r0 + e1 * r1 + e2 * r2 + e3 * r3), mask=inside & (j < count), other=0.0).to(tl.float32)
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=inside)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that add_gpu.py may ask for: kernel, types, constants, options."""
    block = {"BLOCK": BLOCK}
    for out, y in product(("*fp32", "*bf16"), repeat=2):
        types = {"out": out, "x": out, "y": y, "n": "i32", "period": "i32"}
        yield "add", types, block, OPTIONS
    for f in ("*fp32", "*bf16"):
        for z in (f, None):
            yield "scale_add", {"y": f, "x": f, "z": z, "n": "i32", "a": "fp32"}, block, OPTIONS
        yield "tanh", {"y": f, "x": f, "n": "i32"}, block, OPTIONS
        yield "tanh_backward", {"dx": f, "dy": f, "y": f, "n": "i32"}, block, OPTIONS
    for y, x in (("*fp32", "*bf16"), ("*bf16", "*fp32")):
        yield "scale_add", {"y": y, "x": x, "z": None, "n": "i32", "a": "fp32"}, block, OPTIONS
    for i in ("*i32", "*i64"):
        yield "advance", {"y": i, "x": i, "n": "i32", "by": "i32"}, block, OPTIONS
    numbers = dict.fromkeys(("n", "D1", "D2", "D3", "x0", "x1", "x2", "x3", "y0", "y1", "y2", "y3"), "i32")
    yield "add_broadcast", {"out": "*fp32", "x": "*fp32", "y": "*fp32"} | numbers, block, OPTIONS
    numbers = dict.fromkeys(
        ("n", "pieces", "K1", "K2", "K3", "k0", "k1", "k2", "k3", "count", "R1", "R2", "R3", "r0", "r1", "r2", "r3"), "i32"
    )
    for out, x in product(("*fp32", "*bf16"), repeat=2):
        yield "sum_to", {"out": out, "x": x} | numbers, {"BLOCK": 256}, OPTIONS
