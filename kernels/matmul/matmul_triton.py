"""Matrix products in Triton, with what a linear layer adds. The contract is matmul.h; arrays are float32 or bfloat16, sums float32.

float32 is multiplied exactly (`input_precision="ieee"`), bfloat16 by tensor cores; a bfloat16 weight of float32 rows is widened. An
element's chain goes over k in order at every tile, so that with float32 a row has the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fastlm.kernels.activation.activation_triton import activate
from fastlm.kernels.matmul import matmul_tiles as tiles


@triton.jit
def tile_at(tile, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and column of a tile of c (M, N): tiles of the same columns follow one another, eight at a time, so that
    those which run together share what they read in the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band, within = tile // (8 * tiles_n), tile % (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * band, 8)
    return (8 * band + within % height) * BM, within // height * BN


@triton.jit
def _tile(
    c, z, a, b, bias, residual, top, left, M, N, K, flags, activation,
    A_T: tl.constexpr, B_T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The tile of c (M, N) that begins at row `top`, column `left`; from there on offsets fit 32 bits."""
    i, j, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    row, column = i < M - top, j < N - left
    a += top if A_T else top.to(tl.int64) * K
    b += left.to(tl.int64) * K if B_T else left
    at = top.to(tl.int64) * N + left
    c, inside, place = c + at, row & column, i * N + j
    sums = tl.zeros([BM, BN], tl.float32)
    if (flags & 8) != 0:
        sums = tl.load(c + place, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + (k[None, :] * M + i if A_T else i * K + k[None, :]), mask=row & (k < K - start)[None, :], other=0.0)
        w = tl.load(b + (j * K + k[:, None] if B_T else k[:, None] * N + j), mask=(k < K - start)[:, None] & column, other=0.0)
        sums = tl.dot(x, w.to(x.dtype), sums, input_precision="ieee")
        a += M.to(tl.int64) * BK if A_T else BK
        b += BK if B_T else N.to(tl.int64) * BK
    if (flags & 1) != 0:
        sums += tl.load(bias + left + j, mask=column, other=0.0).to(tl.float32)
    if (flags & 2) != 0:
        tl.store(z + at + place, sums.to(z.dtype.element_ty), mask=inside)
    sums, _ = activate(sums, activation)
    if (flags & 4) != 0:
        sums += tl.load(residual + at + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(c + place, sums.to(c.dtype.element_ty), mask=inside)


@triton.jit
def matmul(
    c, z, a, b, bias, residual, M, N, K, flags, activation,
    A_T: tl.constexpr, B_T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """flags: 1 there is a bias, 2 z is kept, 4 there is a residual, 8 c += a b, 16 a and 32 b differ by the matrix of the batch.

    Where one of bias, z and residual is not there its pointer is not read.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    matrix = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    top, left = tile_at(tile, M, N, BM, BN)
    if (flags & 16) != 0:
        a += matrix * M * K
    if (flags & 32) != 0:
        b += matrix * K * N
    at = matrix * M * N
    _tile(c + at, z + at, a, b, bias, residual + at, top, left, M, N, K, flags, activation, A_T, B_T, BM, BN, BK)


@triton.jit
def _run(counts, E, at, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Of tiles of BM rows, dealt to runs of counts[0], counts[1], ... rows: number `at`'s run, first row, rows, and tile in the run."""
    expert, first, rows, before = 0, 0, 0, 0
    tiles, total = 0, 0
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        n = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
        t = tl.cdiv(n, BM)
        ends = tiles + tl.cumsum(t, 0)
        hit = (at >= ends - t) & (at < ends)
        expert += tl.sum(tl.where(hit, e, 0), 0)
        rows += tl.sum(tl.where(hit, n, 0), 0)
        before += tl.sum(tl.where(hit, ends - t, 0), 0)
        first += tl.sum(tl.where(hit, total + tl.cumsum(n, 0) - n, 0), 0)
        tiles += tl.sum(t, 0)
        total += tl.sum(n, 0)
    return expert, first, rows, at - before


@triton.jit
def grouped_rows(
    c, z, a, b, offsets, counts, E, N, K, flags, activation,
    B_T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Runs of rows: c (P, N) = a (P, K) times each expert's matrix, b + offsets[e]; flags as matmul's, 2 alone."""
    tiles_n = tl.cdiv(N, BN)
    expert, first, rows, tile = _run(counts, E, tl.program_id(0) // tiles_n, BM, EXPERTS)
    if rows > 0:
        at, left = first.to(tl.int64) * N, tl.program_id(0) % tiles_n * BN
        b += tl.multiple_of(tl.load(offsets + expert), 8)
        _tile(c + at, z + at, a + first.to(tl.int64) * K, b, a, c, tile * BM, left, rows, N, K, flags, activation,
              False, B_T, BM, BN, BK)  # fmt: skip


@triton.jit
def grouped_weights(
    c, offsets, a, b, counts, E, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Each expert's c + offsets[e], (M, N), += a^T b over its run of rows of a (P, M) and b (P, N)."""
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first, rows = expert * 0, tl.load(counts + expert).to(tl.int32)
    for start in range(0, expert, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        first += tl.sum(tl.load(counts + e, mask=e < expert, other=0).to(tl.int32), 0)
    if rows > 0:
        at = first.to(tl.int64)
        c += tl.multiple_of(tl.load(offsets + expert), 4)
        _tile(c, c, a + at * M, b + at * N, a, c, tile // tiles_n * BM, tile % tiles_n * BN, M, N, rows, 8, 0,
              True, False, BM, BN, BK)  # fmt: skip


@triton.jit
def linear_backward(dz, partial, dy, z, M, N, flags, activation, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """flags: 1 dz = dy act'(z), else dz is dy and neither dz nor z is touched; 2 partial (pieces, N): sums of dz over ROWS rows."""
    blocks = tl.cdiv(N, BLOCK)
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    row = piece * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at, inside = row[:, None] * N + n[None, :], (row < M)[:, None] & (n < N)[None, :]
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if (flags & 1) != 0:
        _, slope = activate(tl.load(z + at, mask=inside, other=0.0).to(tl.float32), activation)
        d *= slope
        tl.store(dz + at, d.to(dz.dtype.element_ty), mask=inside)
    if (flags & 2) != 0:
        tl.store(partial + piece * N + n, tl.sum(d, 0), mask=n < N)


@triton.jit
def linear_bias(dbias, partial, pieces, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dbias (N,) += the partial sums, ROWS at a time in their order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, ROWS):
        piece = start + tl.arange(0, ROWS)
        at = piece.to(tl.int64)[:, None] * N + n[None, :]
        total += tl.sum(tl.load(partial + at, mask=(piece < pieces)[:, None] & (n < N)[None, :], other=0.0), 0)
    tl.store(dbias + n, tl.load(dbias + n, mask=n < N, other=0.0) + total, mask=n < N)


@triton.jit
def linear_activation(y, z, M, N, activation, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M.to(tl.int64) * N
    v, _ = activate(tl.load(z + at, mask=inside, other=0.0).to(tl.float32), activation)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


def variants() -> Iterator[tuple[str, dict[str, str | None], dict[str, Any], dict[str, int]]]:
    """Every form that matmul_gpu.py may ask for: kernel, types, constants, options."""
    for (a, b, c), (a_t, b_t), (tile, options), plain in tiles.products():
        types: dict[str, str | None] = {"c": c, "z": c, "a": a, "b": b, "bias": a, "residual": c}
        types |= {n: "i32" if n in plain else "i32:16" for n in tiles.ALL} | {"flags": "i32", "activation": "i32"}
        yield "matmul", types, {"A_T": a_t, "B_T": b_t} | tile, options
    for (a, b, c), (a_t, b_t), (tile, options), plain in tiles.groups():
        sizes: dict[str, str | None] = {n: "i32" if n in plain else "i32:16" for n in ("M", "N", "K")}
        types = {"offsets": "*i64", "counts": "*i64", "E": "i32"}
        if a_t:
            types = {"c": c, "offsets": "*i64", "a": a, "b": b, "counts": "*i64", "E": "i32", "M": sizes["M"], "N": sizes["N"]}
            yield "grouped_weights", types, tile | {"EXPERTS": tiles.EXPERTS}, options
        else:
            types = {"c": c, "z": c, "a": a, "b": b, **types, "N": sizes["N"], "K": sizes["K"], "flags": "i32", "activation": "i32"}
            yield "grouped_rows", types, {"B_T": b_t, "EXPERTS": tiles.EXPERTS} | tile, options
    wide, half = tiles.WIDE, tiles.HALF
    options = {"num_warps": 4, "num_stages": 3}
    for f in (wide, half):
        types = {"dz": f, "partial": wide, "dy": f, "z": f, "M": "i32", "N": "i32", "flags": "i32", "activation": "i32"}
        yield "linear_backward", types, {"ROWS": 32, "BLOCK": 64}, options
        types = {"y": f, "z": f, "M": "i32", "N": "i32", "activation": "i32"}
        yield "linear_activation", types, {"BLOCK": 1024}, options
    yield "linear_bias", {"dbias": wide, "partial": wide, "pieces": "i32", "N": "i32"}, {"ROWS": 32, "BLOCK": 32}, options
