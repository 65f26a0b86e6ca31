"""Products with ggml's blocks and activations of 8 bits in Triton: the operations of int8_matmul.h in their order, compiled without fused
multiply-adds. x is float32 or bfloat16.

`int8_codes` rounds x; then sums of 32 products of bytes are whole numbers, on the tensor cores where there are rows for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fastlm.kernels.dequantize.dequantize_triton import _byte, _scale_and_minimum, _signed
from fastlm.kernels.int8_matmul import int8_matmul_gpu as host
from fastlm.kernels.matmul.matmul_triton import tile_at
from fastlm.kernels.quantized_matmul.quantized_matmul_gpu import FAMILIES
from fastlm.kernels.quantized_matmul.quantized_matmul_triton import _bytes, _finish, _half


@triton.jit
def rounded(v, largest):
    """round(v * (127 / largest)), ties to even, as whole float32 numbers, and the scale largest / 127; zeros below 2^-100."""
    live = largest >= 7.888609052210118e-31
    safe = tl.where(live, largest, 1.0)
    shifted = tl.where(live, v, 0.0) * tl.div_rn(127.0, safe) + 12582912.0  # 1.5 * 2^23: what follows the point is rounded away
    return shifted - 12582912.0, tl.where(live, safe * 0.007874015718698502, 0.0)


@triton.jit
def _groups(x, at, inside, COUNT: tl.constexpr):
    """Codes (COUNT, 32) and scales (COUNT,) of groups; one with what is not finite has the scale nan."""
    v = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    sane = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 1) != 0
    v = tl.where(sane[:, None], v, 0.0)
    q, scale = rounded(v, tl.max(tl.abs(v), 1)[:, None])
    return q, tl.where(sane, tl.reshape(scale, [COUNT]), float("nan"))


@triton.jit
def int8_codes(codes, scales, sums, x, n, each, M, COUNT: tl.constexpr):
    """codes (n, 32) of the n groups of x, `each` to a row of M; scales and sums (each, M): scale * sum of the codes."""
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside = group < n
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    q, scale = _groups(x, at, inside, COUNT)
    tl.store(codes + at, q.to(tl.int8), mask=inside[:, None])
    to = group % each * M + group // each
    tl.store(scales + to, scale, mask=inside)
    tl.store(sums + to, scale * tl.sum(q, 1), mask=inside)


@triton.jit
def int8_round(y, x, n, COUNT: tl.constexpr):
    """y = x, n groups of 32, with the rounding of its codes: what products of other kinds read."""
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    q, scale = _groups(x, at, group < n, COUNT)
    tl.store(y + at, (q * scale[:, None]).to(y.dtype.element_ty), mask=(group < n)[:, None])


@triton.jit
def _code(row, k, known, form, FAMILY: tl.constexpr):
    """The code at k of a row of blocks, counted from what its format subtracts: int32 from -128 to 127."""
    i = k % 32
    if FAMILY == 2:
        b = row + k // 32 * _bytes(form, FAMILY)
        head = 2 + 2 * (form & 1) + 4 * (form >> 1)
        q = _byte(b + head + i % 16, known) >> (4 * (i // 16)) & 15
        fifth = _byte(b + head - 4 + i // 8, known & (form >= 2)) >> (i % 8) & 1
        return (q | fifth << 4) - tl.where((form & 1) != 0, 0, 8 + 8 * (form >> 1))
    elif FAMILY == 8:
        return _signed(_byte(row + k // 32 * 34 + 2 + i, known))
    elif FAMILY == 12:
        b, j = row + k // 256 * _bytes(form, FAMILY), k % 256 // 32
        q = _byte(b + 16 + 32 * (form >> 1) + 32 * (j // 2) + i, known) >> (4 * (j % 2)) & 15
        return q | (_byte(b + 16 + i, known & (form >= 2)) >> j & 1) << 4
    else:
        b, half, part = row + k // 256 * 210, k % 256 // 128, k % 128 // 32
        low = _byte(b + 64 * half + 32 * (part % 2) + i, known) >> (4 * (part // 2)) & 15
        return (low | (_byte(b + 128 + 32 * half + i, known) >> (2 * part) & 3) << 4) - 32


@triton.jit
def _scale(row, k, known, form, FAMILY: tl.constexpr):
    """Scale and minimum of the code at k."""
    if FAMILY == 2:
        b = row + k // 32 * _bytes(form, FAMILY)
        return _half(b, known), _half(b + 2, known & ((form & 1) != 0))
    elif FAMILY == 8:
        d = _half(row + k // 32 * 34, known)
        return d, d
    elif FAMILY == 12:
        b = row + k // 256 * _bytes(form, FAMILY)
        scale, minimum = _scale_and_minimum(b + 4, k % 256 // 32, known)
        return _half(b, known) * scale, -(_half(b + 2, known) * minimum)
    else:
        b = row + k // 256 * 210
        d = _half(b + 208, known) * _signed(_byte(b + 192 + k % 256 // 16, known)).to(tl.float32)
        return d, d


@triton.jit
def _row(blocks, n, K, form, FAMILY: tl.constexpr):
    return blocks + n.to(tl.int64) * (K // (32 if FAMILY == 2 or FAMILY == 8 else 256) * _bytes(form, FAMILY))


@triton.jit
def int8_row(
    c, z, codes, scales, sums, blocks, bias, residual, flags, activation, M, N, K, form,
    FAMILY: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """BN elements of one row of c, GROUPS of WIDTH columns in a step. Those programs that read the same weights follow one another."""
    m, n = (tl.program_id(0) % M).to(tl.int64), tl.program_id(0) // M * BN + tl.arange(0, BN)
    row = _row(blocks, n, K, form, FAMILY)
    total = tl.zeros([BN, GROUPS], tl.float32)
    for start in range(0, K, GROUPS * WIDTH):
        k = start + WIDTH * tl.arange(0, GROUPS)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
        q = _code(row[:, None, None], k, (n < N)[:, None, None] & (k < K), form, FAMILY)
        whole = tl.sum(q * tl.load(codes + m * K + k, mask=k < K, other=0).to(tl.int32), 2)
        k = start + WIDTH * tl.arange(0, GROUPS)[None, :]
        d, minimum = _scale(row[:, None], k, (n < N)[:, None] & (k < K), form, FAMILY)
        at = k // 32 * M + m
        total += whole.to(tl.float32) * (d * tl.load(scales + at, mask=k < K, other=0.0))
        if FAMILY == 2 or FAMILY == 12:
            total += minimum * tl.load(sums + at, mask=k < K, other=0.0)
    _finish(c, z, bias, residual, tl.sum(total, 1), n, m * N + n, n < N, n < N, flags, activation)


@triton.jit
def int8_tile(
    c, z, codes, scales, sums, blocks, bias, residual, flags, activation, M, N, K, form,
    FAMILY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of c, (BM, BN), group by group in the order of k."""
    top, left = tile_at(tl.program_id(0), M, N, BM, BN)
    m, n = top + tl.arange(0, BM), left + tl.arange(0, BN)
    row, i = _row(blocks, n, K, form, FAMILY), tl.arange(0, 32)
    here = codes + m.to(tl.int64)[:, None] * K + i[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, 32):
        a = tl.load(here + k, mask=(m < M)[:, None], other=0)
        b = _code(row[None, :], (k + i)[:, None], (n < N)[None, :], form, FAMILY).to(tl.int8)
        s = tl.load(scales + k // 32 * M + m, mask=m < M, other=0.0)[:, None]
        d, minimum = _scale(row, k, n < N, form, FAMILY)
        if FAMILY == 14:
            whole = tl.dot(tl.where(i[None, :] < 16, a, 0), b, out_dtype=tl.int32)
            total += whole.to(tl.float32) * (d[None, :] * s)
            d, minimum = _scale(row, k + 16, n < N, form, FAMILY)
            whole = tl.dot(tl.where(i[None, :] < 16, 0, a), b, out_dtype=tl.int32)
        else:
            whole = tl.dot(a, b, out_dtype=tl.int32)
        total += whole.to(tl.float32) * (d[None, :] * s)
        if FAMILY == 2 or FAMILY == 12:
            total += minimum[None, :] * tl.load(sums + k // 32 * M + m, mask=m < M, other=0.0)[:, None]
    n, inside = n[None, :], (m < M)[:, None] & (n < N)[None, :]
    _finish(c, z, bias, residual, total, n, m.to(tl.int64)[:, None] * N + n, n < N, inside, flags, activation)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """Every form that int8_matmul_gpu.py may ask for: kernel, types, constants, options."""
    F = "*fp32"
    plain = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    for f in (F, "*bf16"):
        types: dict[str, str | None] = {"codes": "*i8", "scales": F, "sums": F, "x": f, "n": "i32", "each": "i32", "M": "i32"}
        yield "int8_codes", types, {"COUNT": host.CODES}, plain
        yield "int8_round", {"y": f, "x": f, "n": "i32"}, {"COUNT": host.CODES}, plain
        types = {"c": f, "z": f, "codes": "*i8", "scales": F, "sums": F, "blocks": "*u8", "bias": f, "residual": f}
        types |= {"flags": "i32", "activation": "i32", "M": "i32", "N": "i32", "K": "i32:16", "form": "i32"}
        for family in FAMILIES:
            for _, kernel, tile, options in host.FORMS:
                made = {"FAMILY": family, **host.constants(family, tile)}
                yield kernel, types, made, options | {"enable_fp_fusion": False}
