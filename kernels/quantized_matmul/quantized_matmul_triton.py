"""Products with ggml's blocks in Triton: c = act(x W^T + bias) + residual. x is float32 or bfloat16, sums are float32.

A block is decoded in registers (its bytes: dequantize_triton.py). In a byte lie two weights, or two bytes are taken together, so that
each step has a low and a high part, which are multiplied with their own columns of x: nothing is put back in the order of k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fastlm.kernels.activation.activation_triton import activate
from fastlm.kernels.dequantize.dequantize_triton import _byte, _scale_and_minimum, _signed
from fastlm.kernels.matmul import matmul_tiles as tiles
from fastlm.kernels.matmul.matmul_triton import _run, tile_at
from fastlm.kernels.quantized_matmul import quantized_matmul_gpu as host


@triton.jit
def _half(p, known):
    return tl.load(p.to(tl.pointer_type(tl.float16)), mask=known, other=0.0).to(tl.float32)


@triton.jit
def _bytes(form, FAMILY: tl.constexpr):
    """Of a block. form: 1 there are minima, 2 there are fifth bits."""
    if FAMILY == 2:
        return 18 + 2 * (form & 1) + 4 * (form >> 1)
    elif FAMILY == 8:
        return 34
    elif FAMILY == 12:
        return 144 + 32 * (form >> 1)
    else:
        return 210


@triton.jit
def _column(group, i, FAMILY: tl.constexpr):
    """k of weight i of a group's low part; that of the high part is 16, 32 or 64 more (HIGH in quantized_matmul_gpu.py)."""
    if FAMILY == 12:
        return 64 * group + i
    elif FAMILY == 14:
        return 128 * (group // 4) + 32 * (group % 4 // 2) + 16 * (group % 2) + i
    else:
        return 32 * group + i


@triton.jit
def _of_32(row, group, i, known, form, FAMILY: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0: a group is a block."""
    b = row + group * _bytes(form, FAMILY)
    d = _half(b, known)
    if FAMILY == 8:
        return d * _signed(_byte(b + 2 + i, known)).to(tl.float32), d * _signed(_byte(b + 18 + i, known)).to(tl.float32)
    else:
        head = 2 + 2 * (form & 1) + 4 * (form >> 1)
        middle = tl.where((form & 1) != 0, 0, 8 + 8 * (form >> 1))
        m = _half(b + 2, known & ((form & 1) != 0))
        q = _byte(b + head + i, known)
        fifth = (b + head - 4).to(tl.pointer_type(tl.uint16))
        there = known & (form >= 2)
        low = q & 15 | (tl.load(fifth, mask=there, other=0).to(tl.int32) >> i & 1) << 4
        high = q >> 4 | (tl.load(fifth + 1, mask=there, other=0).to(tl.int32) >> i & 1) << 4
        return d * (low - middle).to(tl.float32) + m, d * (high - middle).to(tl.float32) + m


@triton.jit
def _of_256(row, group, i, known, form, FAMILY: tl.constexpr):
    """Q4_K, Q5_K: a group is an even and an odd sub-block of 32, whose weights share their bytes."""
    b, j = row + group // 4 * _bytes(form, FAMILY), group % 4
    d, dmin = _half(b, known), _half(b + 2, known)
    scale0, minimum0 = _scale_and_minimum(b + 4, 2 * j, known)
    scale1, minimum1 = _scale_and_minimum(b + 4, 2 * j + 1, known)
    q = _byte(b + 16 + 32 * (form >> 1) + 32 * j + i, known)
    fifth = _byte(b + 16 + i, known & (form >= 2)) >> (2 * j)
    low, high = q & 15 | (fifth & 1) << 4, q >> 4 | (fifth >> 1 & 1) << 4
    even = (d * scale0) * low.to(tl.float32) - dmin * minimum0
    return even, (d * scale1) * high.to(tl.float32) - dmin * minimum1


@triton.jit
def _q6_k(row, group, i, known):
    """A group is 16 weights and the 16 that lie in the same bytes, 64 later."""
    b, g = row + group // 8 * 210, group % 8
    q = _byte(b + 16 * g + i, known)
    pair = _byte(b + 128 + 32 * (g // 4) + 16 * (g % 2) + i, known) >> (2 * (g % 4 // 2))
    d = _half(b + 208, known)
    at = b + 192 + 8 * (g // 4) + g % 4
    low, high = (q & 15 | (pair & 3) << 4) - 32, (q >> 4 | (pair >> 4 & 3) << 4) - 32
    first, second = _signed(_byte(at, known)).to(tl.float32), _signed(_byte(at + 4, known)).to(tl.float32)
    return (d * first) * low.to(tl.float32), (d * second) * high.to(tl.float32)


@triton.jit
def _parts(blocks, n, N, start, groups, form, FAMILY: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows n (BN,), groups from `start`: the low and the high part, (BN, GROUPS, WIDTH) float32, 0 outside."""
    group = start + tl.arange(0, GROUPS)[None, :, None]
    i = tl.arange(0, WIDTH)[None, None, :]
    known = (n < N)[:, None, None] & (group < groups)
    each = groups // (4 if FAMILY == 12 else 8 if FAMILY == 14 else 1)
    row = blocks + n.to(tl.int64)[:, None, None] * (each * _bytes(form, FAMILY))
    if FAMILY == 12:
        return _of_256(row, group, i, known, form, FAMILY)
    elif FAMILY == 14:
        return _q6_k(row, group, i, known)
    else:
        return _of_32(row, group, i, known, form, FAMILY)


@triton.jit
def _finish(c, z, bias, residual, sums, n, at, known, inside, flags, activation):
    """flags: 1 there is a bias, 2 z is kept, 4 there is a residual."""
    if (flags & 1) != 0:
        sums += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)
    if (flags & 2) != 0:
        tl.store(z + at, sums.to(z.dtype.element_ty), mask=inside)
    sums, _ = activate(sums, activation)
    if (flags & 4) != 0:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(c + at, sums.to(c.dtype.element_ty), mask=inside)


@triton.jit
def quantized_row(
    c, z, x, blocks, bias, residual, flags, activation, M, N, K, form,
    FAMILY: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """BN elements of one row of c. Those programs that read the same weights follow one another."""
    m, n = (tl.program_id(0) % M).to(tl.int64), tl.program_id(0) // M * BN + tl.arange(0, BN)
    x += m * K
    groups = K // (2 * WIDTH)
    sums = tl.zeros([BN, GROUPS, WIDTH], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)[None, :, None]
        k = _column(group, tl.arange(0, WIDTH)[None, None, :], FAMILY)
        low, high = _parts(blocks, n, N, start, groups, form, FAMILY, GROUPS, WIDTH)
        sums += low * tl.load(x + k, mask=group < groups, other=0.0).to(tl.float32)
        sums += high * tl.load(x + k + HIGH, mask=group < groups, other=0.0).to(tl.float32)
    total = tl.sum(tl.reshape(sums, [BN, GROUPS * WIDTH]), 1)
    _finish(c, z, bias, residual, total, n, m * N + n, n < N, n < N, flags, activation)


@triton.jit
def _tile(
    c, z, x, blocks, bias, residual, top, left, M, N, K, form, flags, activation,
    FAMILY: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The tile of c (M, N) that begins at (top, left)."""
    i, n = tl.arange(0, BM)[:, None], left + tl.arange(0, BN)
    row = i < M - top
    x += top.to(tl.int64) * K
    column = tl.arange(0, GROUPS * WIDTH)[None, :]
    groups = K // (2 * WIDTH)
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + column // WIDTH
        at, known = i * K + _column(group, column % WIDTH, FAMILY), row & (group < groups)
        low, high = _parts(blocks, n, N, start, groups, form, FAMILY, GROUPS, WIDTH)
        a = tl.load(x + at, mask=known, other=0.0)
        sums = tl.dot(a, tl.trans(tl.reshape(low, [BN, GROUPS * WIDTH])).to(a.dtype), sums, input_precision="ieee")
        a = tl.load(x + at + HIGH, mask=known, other=0.0)
        sums = tl.dot(a, tl.trans(tl.reshape(high, [BN, GROUPS * WIDTH])).to(a.dtype), sums, input_precision="ieee")
    n = n[None, :]
    to = (top + i).to(tl.int64) * N + n
    _finish(c, z, bias, residual, sums, n, to, n < N, row & (n < N), flags, activation)


@triton.jit
def quantized_tile(
    c, z, x, blocks, bias, residual, flags, activation, M, N, K, form,
    FAMILY: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A tile of c, (BM, BN)."""
    top, left = tile_at(tl.program_id(0), M, N, BM, BN)
    _tile(c, z, x, blocks, bias, residual, top, left, M, N, K, form, flags, activation, FAMILY, HIGH, WIDTH, BM, BN, GROUPS)


@triton.jit
def quantized_group(
    c, z, x, blocks, offsets, counts, E, N, K, form, flags, activation,
    FAMILY: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Runs of rows: a tile of c (P, N) = x (P, K) times each expert's blocks, which begin at offsets[e]; flags: 2 z is kept."""
    tiles_n = tl.cdiv(N, BN)
    expert, first, rows, tile = _run(counts, E, tl.program_id(0) // tiles_n, BM, EXPERTS)
    if rows > 0:
        at, left = first.to(tl.int64) * N, tl.program_id(0) % tiles_n * BN
        blocks += tl.load(offsets + expert)
        _tile(c + at, z + at, x + first.to(tl.int64) * K, blocks, x, c, tile * BM, left, rows, N, K, form, flags, activation,
              FAMILY, HIGH, WIDTH, BM, BN, GROUPS)  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that quantized_matmul_gpu.py may ask for: kernel, types, constants, options."""
    for dtype, forms in host.FORMS.items():
        f = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
        types: dict[str, str | None] = {"c": f, "z": f, "x": f, "blocks": "*u8", "bias": f, "residual": f}
        types |= {"flags": "i32", "activation": "i32", "M": "i32", "N": "i32", "K": "i32:16", "form": "i32"}
        for family in host.FAMILIES:
            for _, kernel, form, options in forms:
                yield kernel, types, host._constants(family, form), options
            several: dict[str, str | None] = {
                "c": f,
                "z": f,
                "x": f,
                "blocks": "*u8",
                "offsets": "*i64",
                "counts": "*i64",
                "E": "i32",
            }
            several |= {n: types[n] for n in ("N", "K", "form", "flags", "activation")}
            for _, form, warps in host.GROUPED[dtype]:
                constants = host._constants(family, form) | {"EXPERTS": tiles.EXPERTS}
                yield "quantized_group", several, constants, {"num_warps": warps, "num_stages": 3}
