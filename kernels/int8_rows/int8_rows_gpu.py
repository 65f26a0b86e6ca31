"""Products with rows of 8 bits and rounded rows of x on the GPU, the host's side, on the blocks of a `QuantizedArray` as they are."""

from __future__ import annotations

from typing import Any

from fastlm.kernels.quantized_matmul.quantized_matmul_gpu import check_together, rest

# The most rows, the tile, warps: two sums of a tile lie in registers. The first that fits is taken.
TILES = [(16, {"BM": 16, "BN": 16, "BK": 128}, 4), (1 << 31, {"BM": 64, "BN": 32, "BK": 64}, 8)]
BLOCK = 1024  # numbers of x that a program reads in a step
WEIGHTS = 1024  # that a program expands

EXPECTS = {"int8_rows_tile *": {"80": "IMMA"}, "int8_rows_tile * BM=64 *": {"90": "IGMMA"}}


def int8_rows(
    gpu: Any, c: Any, z: Any, x: Any, blocks: Any, columns: Any, bias: Any, residual: Any, M: int, N: int, K: int, activation: int
) -> None:
    """c (M, N) = act(x W^T + bias) + residual; blocks (N, 4 + K) uint8; columns (K,) float32 or None: ones; z, where it is wanted, is what
    the activation is applied to.

    Raises TypeError where the dtypes do not go together.
    """
    if not (M and N):
        return
    check_together("int8_rows", x, c=c, z=z, bias=bias, residual=residual)
    wide = -(-K // 16) * 16  # rows of codes begin at whole vectors
    codes, high, scales = gpu.empty((M, wide), "int8"), gpu.empty((M, wide), "int8"), gpu.empty((M,))
    given = {"codes": codes, "high": high, "scales": scales, "x": x, "columns": columns, "K": K, "wide": wide}
    gpu.triton("int8_rows_codes", (M,), given, plain=("K",), fused=False, BLOCK=BLOCK)
    _, tile, warps = next(t for t in TILES if t[0] >= M)
    arguments = {"c": c, "z": c if z is None else z, "codes": codes, "high": high, "scales": scales}
    arguments |= {"blocks": blocks} | rest(c, z, x, bias, residual, activation) | {"M": M, "N": N, "K": K, "wide": wide}
    grid = -(-M // tile["BM"]) * -(-N // tile["BN"])
    gpu.triton("int8_rows_tile", (grid,), arguments, plain=("flags", "activation", "M", "N"), warps=warps, fused=False, **tile)


def int8_rows_weight(gpu: Any, w: Any, blocks: Any, columns: Any) -> None:
    """w (N, K), float32 or bfloat16, as its blocks say."""
    N, K = w.shape
    arguments = {"w": w, "blocks": blocks, "columns": columns, "K": K}
    gpu.triton("int8_rows_weight", (N, -(-K // WEIGHTS)), arguments, plain=("K",), fused=False, BLOCK=WEIGHTS)
