"""Products with rows of 8 bits and rounded rows of x in Triton: the operations of int8_rows.h, compiled without fused multiply-adds, so
that every row has the CPU's bits. x is float32 or bfloat16.

`int8_rows_codes` rounds x to low bytes and to what these leave over 256, which is zero but for two numbers of a row; both are multiplied
on the tensor cores: columns of the weight for two numbers would be strided bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fastlm.kernels.int8_matmul.int8_matmul_triton import rounded
from fastlm.kernels.int8_rows import int8_rows_gpu as host
from fastlm.kernels.matmul.matmul_triton import tile_at
from fastlm.kernels.quantized_matmul.quantized_matmul_triton import _finish


@triton.jit
def _numbers(x, columns, k, K):
    """x times its columns, float32; 0 outside."""
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if columns is not None:
        v *= tl.load(columns + k, mask=k < K, other=0.0)
    return v


@triton.jit
def _magnitude(key):
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def int8_rows_codes(codes, high, scales, x, columns, K, wide, BLOCK: tl.constexpr):
    """A row: low bytes of codes (wide,) and what they leave over 256 (wide,), zeros from K on, and its scale, nan where a number is not
    finite."""
    m, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x += m * K
    # A key is a magnitude's bits and, below, its place, which tells equal ones apart; 0 where there is no number. Each lane keeps its
    # three largest.
    first, second, third = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        k = start + i
        size = tl.abs(_numbers(x, columns, k, K))
        finite = size < float("inf")
        wrong |= (finite == 0).to(tl.int32)
        key = tl.where(finite & (k < K), size.to(tl.int32, bitcast=True).to(tl.int64) << 32 | k.to(tl.int64), 0)
        low = tl.minimum(first, key)
        first = tl.maximum(first, key)
        lower = tl.minimum(second, low)
        second = tl.maximum(second, low)
        third = tl.maximum(third, lower)
    sane = tl.max(wrong, 0) == 0
    one = tl.max(first, 0)
    mine = first == one
    first, second = tl.where(mine, second, first), tl.where(mine, third, second)
    two = tl.max(first, 0)
    rest = tl.max(tl.where(first == two, second, first), 0)
    largest = tl.where(sane, tl.maximum(_magnitude(rest), _magnitude(one) * 0.00390625), 0.0)
    for start in range(0, wide, BLOCK):
        k = start + i
        q, _ = rounded(_numbers(x, columns, k, K), largest)
        raised = q.to(tl.int32) + 128
        tl.store(codes + m * wide + k, ((raised & 255) - 128).to(tl.int8), mask=k < wide)
        tl.store(high + m * wide + k, (raised >> 8).to(tl.int8), mask=k < wide)
    _, scale = rounded(largest, largest)
    tl.store(scales + m, tl.where(sane, scale, float("nan")))


@triton.jit
def _row_scale(row, known):
    """The float32 at the beginning of a row, which lies at any byte."""
    bits = tl.load(row, mask=known, other=0).to(tl.int32)
    for b in tl.static_range(1, 4):
        bits |= tl.load(row + b, mask=known, other=0).to(tl.int32) << (8 * b)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def int8_rows_tile(
    c, z, codes, high, scales, blocks, bias, residual, flags, activation, M, N, K, wide,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of c, (BM, BN)."""
    top, left = tile_at(tl.program_id(0), M, N, BM, BN)
    m, n = top + tl.arange(0, BM), left + tl.arange(0, BN)
    i, known = tl.arange(0, BK), n < N
    row = blocks + n.to(tl.int64) * (K + 4)
    here, there = m.to(tl.int64)[:, None] * wide + i[None, :], row[None, :] + 4 + i[:, None]
    low = tl.zeros([BM, BN], tl.int32)
    top = tl.zeros([BM, BN], tl.int32)
    for k in range(0, K, BK):
        inside = (m < M)[:, None] & (i < wide - k)[None, :]
        b = tl.load(there + k, mask=known[None, :] & (i < K - k)[:, None], other=0).to(tl.int8, bitcast=True)
        low = tl.dot(tl.load(codes + here + k, mask=inside, other=0), b, low, out_dtype=tl.int32)
        top = tl.dot(tl.load(high + here + k, mask=inside, other=0), b, top, out_dtype=tl.int32)
    d, s = _row_scale(row, known)[None, :], tl.load(scales + m, mask=m < M, other=0.0)[:, None]
    total = (low + (top << 8)).to(tl.float32) * (d * s)
    n, inside = n[None, :], (m < M)[:, None] & known[None, :]
    _finish(c, z, bias, residual, total, n, m.to(tl.int64)[:, None] * N + n, n < N, inside, flags, activation)


@triton.jit
def int8_rows_weight(w, blocks, columns, K, BLOCK: tl.constexpr):
    """BLOCK weights of a row."""
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = blocks + n * (K + 4)
    v = tl.load(row + 4 + k, mask=k < K, other=0).to(tl.int8, bitcast=True).to(tl.float32) * _row_scale(row, True)
    if columns is not None:
        v *= tl.load(columns + k, mask=k < K, other=0.0)
    tl.store(w + n * K + k, v.to(w.dtype.element_ty), mask=k < K)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """Every form that int8_rows_gpu.py may ask for: kernel, types, constants, options."""
    F, options = "*fp32", {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    for f in (F, "*bf16"):
        for columns in (F, None):
            types: dict[str, str | None] = {"codes": "*i8", "high": "*i8", "scales": F, "x": f, "columns": columns}
            yield "int8_rows_codes", types | {"K": "i32", "wide": "i32:16"}, {"BLOCK": host.BLOCK}, options
            yield "int8_rows_weight", {"w": f, "blocks": "*u8", "columns": columns, "K": "i32"}, {"BLOCK": host.WEIGHTS}, options
        types = {"c": f, "z": f, "codes": "*i8", "high": "*i8", "scales": F, "blocks": "*u8", "bias": f}
        types |= {"residual": f, "flags": "i32", "activation": "i32", "M": "i32", "N": "i32"}
        for _, tile, warps in host.TILES:
            for K in ("i32:16", "i32"):
                yield "int8_rows_tile", types | {"K": K, "wide": "i32:16"}, tile, options | {"num_warps": warps}
