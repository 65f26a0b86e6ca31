"""AdamW and the global norm over many tensors in Triton. The contract is adamw.h; a program takes a piece of BLOCK elements of one tensor.

table (T, 8) int64: addresses of parameter, m, v, gradient and of the bfloat16 copy, elements, bits of the weight decay. pieces (N, 2):
tensor, and which piece of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

PIECE = 4096


@triton.jit
def _pointer(table, tensor, i: tl.constexpr, type: tl.constexpr):
    return tl.multiple_of(tl.load(table + tensor * 8 + i).to(tl.pointer_type(type)), 16)


@triton.jit
def _update(p, m, v, g, copy, at, inside, numbers, decay, rest1, rest2, beta2, eps, COPY: tl.constexpr):
    step_size, bias2, lr, scale = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    gradient = tl.load(g + at, mask=inside) * scale
    m0 = tl.load(m + at, mask=inside)
    m1 = m0 + rest1 * (gradient - m0)
    v1 = beta2 * tl.load(v + at, mask=inside) + rest2 * gradient * gradient
    tl.store(m + at, m1, mask=inside)
    tl.store(v + at, v1, mask=inside)
    new = tl.load(p + at, mask=inside) * (1.0 - lr * decay) - step_size * (m1 / (tl.sqrt(v1) / bias2 + eps))
    tl.store(p + at, new, mask=inside)
    if COPY:
        tl.store(copy + at, new.to(tl.bfloat16), mask=inside)


@triton.jit
def adamw_step(table, pieces, numbers, rest1, rest2, beta2, eps, BLOCK: tl.constexpr, COPY: tl.constexpr):
    """numbers: lr / (1 - beta1^step), sqrt(1 - beta2^step), lr, scale; a scale that is not finite changes nothing."""
    if tl.abs(tl.load(numbers + 3)) < float("inf"):
        tensor = tl.load(pieces + 2 * tl.program_id(0)).to(tl.int64)
        start = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
        p, m = _pointer(table, tensor, 0, tl.float32), _pointer(table, tensor, 1, tl.float32)
        v, g = _pointer(table, tensor, 2, tl.float32), _pointer(table, tensor, 3, tl.float32)
        copy = _pointer(table, tensor, 4, tl.bfloat16)
        n = tl.load(table + tensor * 8 + 5)
        decay = tl.load(table + tensor * 8 + 6).to(tl.int32).to(tl.float32, bitcast=True)
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= n:  # whole vectors
            _update(p, m, v, g, copy, at, None, numbers, decay, rest1, rest2, beta2, eps, COPY)
        else:
            _update(p, m, v, g, copy, at, at < n, numbers, decay, rest1, rest2, beta2, eps, COPY)


@triton.jit
def _power(base, n):
    """base^n in float64, n >= 0."""
    power = base * 0.0 + 1.0
    for i in range(31):
        power = tl.where((n >> i) & 1 != 0, power * base, power)
        base = base * base
    return power


@triton.jit
def adamw_numbers(numbers, step, lr, scale, rest1, rest2):
    """What adamw_step reads, from memory; rest1 = 1 - beta1, rest2 = 1 - beta2."""
    one = tl.full([1], 1.0, tl.float64)
    t, rate = tl.load(step), tl.load(lr)
    bias1 = one - _power(one - rest1, t)
    bias2 = one - _power(one - rest2, t)
    at = numbers + tl.arange(0, 1)
    tl.store(at, (rate.to(tl.float64) / bias1).to(tl.float32))
    tl.store(at + 1, tl.sqrt_rn(bias2.to(tl.float32)))
    tl.store(numbers + 2, rate)
    if scale is not None:
        tl.store(numbers + 3, tl.load(scale))
    else:
        tl.store(numbers + 3, 1.0)


@triton.jit
def adamw_square_sum(partial, table, pieces, BLOCK: tl.constexpr):
    tensor = tl.load(pieces + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    g = _pointer(table, tensor, 3, tl.float32)
    n = tl.load(table + tensor * 8 + 5)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        x = tl.load(g + at).to(tl.float64)
        tl.store(partial + tl.program_id(0), tl.sum(x * x, 0))
    else:
        x = tl.load(g + at, mask=at < n, other=0.0).to(tl.float64)
        tl.store(partial + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def adamw_norm(norm, partial, n, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partial + at, mask=at < n, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(sums, 0)).to(tl.float32))


@triton.jit
def adamw_clip(scale, norm, clip):
    length = tl.load(norm)
    found = tl.minimum(clip / (length + 1e-6), 1.0)
    tl.store(scale, tl.where(length < float("inf"), found, float("nan")))  # nan is not less either


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that adamw_gpu.py may ask for: kernel, types, constants, options."""
    one, four, eight = ({"num_warps": n, "num_stages": 3} for n in (1, 4, 8))
    rests = {"rest1": "fp32", "rest2": "fp32"}
    types = {"table": "*i64", "pieces": "*i32", "numbers": "*fp32"} | rests | {"beta2": "fp32", "eps": "fp32"}
    for copy in (False, True):
        yield "adamw_step", types, {"BLOCK": PIECE, "COPY": copy}, eight
    for scale in ("*fp32", None):
        yield "adamw_numbers", {"numbers": "*fp32", "step": "*i32", "lr": "*fp32", "scale": scale} | rests, {}, one
    yield "adamw_square_sum", {"partial": "*fp64", "table": "*i64", "pieces": "*i32"}, {"BLOCK": PIECE}, eight
    yield "adamw_norm", {"norm": "*fp32", "partial": "*fp64", "n": "i32"}, {"BLOCK": 1024}, four
    yield "adamw_clip", {"scale": "*fp32", "norm": "*fp32", "clip": "fp32"}, {}, one
