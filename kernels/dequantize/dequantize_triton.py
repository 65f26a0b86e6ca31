"""Quantised blocks to float32 or bfloat16 in Triton, by ggml's definitions (dequantize.h, blocks.h).

Products and sums are rounded separately, as on the CPU: the kernels are compiled without fused multiply-adds. A program decodes some
2048 weights; a block's bytes are read where they lie, an odd number of two bytes from the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

# kind -> blocks of a program; kinds are ggml's numbers
PROGRAM = {2: 64, 3: 64, 6: 64, 7: 64, 8: 64, 12: 8, 13: 8, 14: 8}


@triton.jit
def _half(p, known):
    """The float16 at p; nan where the row is not known."""
    return tl.load(p.to(tl.pointer_type(tl.float16)), mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def _byte(p, known):
    return tl.load(p, mask=known, other=0).to(tl.int32)


@triton.jit
def _signed(x):
    """A byte as the int8 that it is."""
    return ((x + 128) & 255) - 128


@triton.jit
def _of_32(b, known, KIND: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1: the first and the last 16 weights of each block, (blocks, 16)."""
    i = tl.arange(0, 16)[None, :]
    head: tl.constexpr = (2 if KIND == 2 or KIND == 6 else 4) + (4 if KIND >= 6 else 0)
    d = _half(b, known)
    q = _byte(b + head + i, known)
    low, high = q & 15, q >> 4
    if KIND >= 6:
        low |= (_byte(b + (head - 4) + i // 8, known) >> (i % 8) & 1) << 4
        high |= (_byte(b + (head - 2) + i // 8, known) >> (i % 8) & 1) << 4
    if KIND == 2 or KIND == 6:
        middle: tl.constexpr = 8 if KIND == 2 else 16
        return d * (low - middle).to(tl.float32), d * (high - middle).to(tl.float32)
    else:
        m = _half(b + 2, known)
        return d * low.to(tl.float32) + m, d * high.to(tl.float32) + m


@triton.jit
def _scale_and_minimum(s, j, known):
    """The 6-bit scale and minimum of sub-block j from the 12 bytes at s of Q4_K and Q5_K."""
    first = _byte(s + j % 4, known)
    second = _byte(s + j % 4 + 4, known)
    third = _byte(s + j % 4 + 8, known)
    scale = tl.where(j < 4, first & 63, (third & 15) | (first >> 6) << 4)
    minimum = tl.where(j < 4, second & 63, (third >> 4) | (second >> 6) << 4)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _of_256(b, known, KIND: tl.constexpr):
    """Q4_K, Q5_K: the even and the odd sub-blocks of 32, (blocks, 4, 32). b (blocks, 1, 1)."""
    j = tl.arange(0, 4)[None, :, None]
    i = tl.arange(0, 32)[None, None, :]
    d, dmin = _half(b, known), _half(b + 2, known)
    scale0, minimum0 = _scale_and_minimum(b + 4, 2 * j, known)
    scale1, minimum1 = _scale_and_minimum(b + 4, 2 * j + 1, known)
    q = _byte(b + (16 if KIND == 12 else 48) + 32 * j + i, known)
    low, high = q & 15, q >> 4
    if KIND == 13:
        fifth = _byte(b + 16 + i + 0 * j, known)
        low |= (fifth >> (2 * j) & 1) << 4
        high |= (fifth >> (2 * j + 1) & 1) << 4
    even = (d * scale0) * low.to(tl.float32) - dmin * minimum0
    return even, (d * scale1) * high.to(tl.float32) - dmin * minimum1


@triton.jit
def _q6_k(b, known):
    """All sub-blocks of 32, (blocks, 8, 32)."""
    j = tl.arange(0, 8)[None, :, None]
    i = tl.arange(0, 32)[None, None, :]
    half, part = j // 4, j % 4
    low = _byte(b + 64 * half + 32 * (part % 2) + i, known) >> (4 * (part // 2)) & 15
    high = _byte(b + 128 + 32 * half + i, known) >> (2 * part) & 3
    scale = _half(b + 208, known) * _signed(_byte(b + 192 + 2 * j + i // 16, known)).to(tl.float32)
    return scale * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def dequantize(w, blocks, ids, n, each, rows, chosen, KIND: tl.constexpr, BYTES: tl.constexpr, COUNT: tl.constexpr):
    """w (n, values of a block): n blocks, `each` to a row, of the rows ids of `rows` where `chosen`. Other rows become nan."""
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    row = block // each
    if chosen:
        row = tl.load(ids + row, mask=block < n, other=0)
    known = (block < n) & (row >= 0) & (row < rows)
    b = (row.to(tl.int64) * each + block % each) * BYTES
    if KIND < 8:
        low, high = _of_32(blocks + b[:, None], known[:, None], KIND)
        to = w + block.to(tl.int64)[:, None] * 32 + tl.arange(0, 16)[None, :]
        tl.store(to, low.to(w.dtype.element_ty), mask=(block < n)[:, None])
        tl.store(to + 16, high.to(w.dtype.element_ty), mask=(block < n)[:, None])
    elif KIND == 8:
        i = tl.arange(0, 32)[None, :]
        q = _signed(_byte(blocks + b[:, None] + 2 + i, known[:, None]))
        v = _half(blocks + b[:, None], known[:, None]) * q.to(tl.float32)
        tl.store(w + block.to(tl.int64)[:, None] * 32 + i, v.to(w.dtype.element_ty), mask=(block < n)[:, None])
    else:
        from_, known = blocks + b[:, None, None], known[:, None, None]
        inside = (block < n)[:, None, None]
        to = w + block.to(tl.int64)[:, None, None] * 256 + tl.arange(0, 32)[None, None, :]
        if KIND == 14:
            v = _q6_k(from_, known)
            tl.store(to + 32 * tl.arange(0, 8)[None, :, None], v.to(w.dtype.element_ty), mask=inside)
        else:
            even, odd = _of_256(from_, known, KIND)
            to += 64 * tl.arange(0, 4)[None, :, None]
            tl.store(to, even.to(w.dtype.element_ty), mask=inside)
            tl.store(to + 32, odd.to(w.dtype.element_ty), mask=inside)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """Every form that dequantize_gpu.py may ask for: kernel, types, constants, options."""
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    sizes = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 12: 144, 13: 176, 14: 210}
    for (kind, size), w in product(sizes.items(), ("*fp32", "*bf16")):
        types = {"w": w, "blocks": "*u8", "ids": "*i32", "n": "i32", "each": "i32", "rows": "i32", "chosen": "i32"}
        yield "dequantize", types, {"KIND": kind, "BYTES": size, "COUNT": PROGRAM[kind]}, options
