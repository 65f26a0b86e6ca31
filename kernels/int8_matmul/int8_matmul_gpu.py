"""Products with ggml's blocks and activations of 8 bits on the GPU, the host's side, on blocks as files have them."""

from __future__ import annotations

from typing import Any

from fastlm.kernels.quantized_matmul.quantized_matmul_gpu import KINDS, check_together, rest

# The most rows, the kernel, its tile, options; the first that fits is taken. A few rows are read one by one.
FORMS: list[tuple[int, str, dict[str, int], dict[str, int]]] = [
    (8, "int8_row", {"BN": 8, "COLUMNS": 512}, {"num_warps": 4, "num_stages": 3}),
    (1 << 31, "int8_tile", {"BM": 64, "BN": 64}, {"num_warps": 8, "num_stages": 2}),
]
CODES = 64  # groups of 32 that a program rounds

# Tiles are products of bytes on tensor cores: tools/gpu_build.py --check.
EXPECTS = {"int8_tile *": {"80": "IMMA", "90": "IGMMA"}}


def int8_matmul(
    gpu: Any, c: Any, z: Any, x: Any, blocks: Any, bias: Any, residual: Any, M: int, N: int, K: int, kind: int, activation: int
) -> None:
    """c (M, N) = act(x blocks^T + bias) + residual, x rounded to 8 bits; z, where it is wanted, is what the activation is applied to.

    Raises TypeError where the dtypes do not go together.
    """
    if not (M and N):
        return
    check_together("int8_matmul", x, c=c, z=z, bias=bias, residual=residual)
    each = K // 32
    codes, scales, sums = gpu.empty((M, K), "int8"), gpu.empty((each, M)), gpu.empty((each, M))
    given = {"codes": codes, "scales": scales, "sums": sums, "x": x, "n": M * each, "each": each, "M": M}
    gpu.triton("int8_codes", (-(-M * each // CODES),), given, plain=("n", "each", "M"), fused=False, COUNT=CODES)
    family, form = KINDS[kind]
    _, kernel, tile, options = next(f for f in FORMS if f[0] >= M)
    arguments = {"c": c, "z": c if z is None else z, "codes": codes, "scales": scales, "sums": sums, "blocks": blocks}
    arguments |= rest(c, z, x, bias, residual, activation) | {"M": M, "N": N, "K": K, "form": form}
    grid = -(-M // tile.get("BM", 1)) * -(-N // tile["BN"])
    gpu.triton(
        kernel, (grid,), arguments, plain=("M", "N", "form", "flags", "activation"), fused=False,
        warps=options["num_warps"], stages=options["num_stages"], FAMILY=family, **constants(family, tile),
    )  # fmt: skip


def int8_round(gpu: Any, y: Any, x: Any) -> None:
    """y = x as its codes and scales say, in x's dtype; the last axis is a multiple of 32."""
    gpu.triton(
        "int8_round", (-(-x.size // (32 * CODES)),), {"y": y, "x": x, "n": x.size // 32}, plain=("n",), fused=False, COUNT=CODES
    )


def constants(family: int, tile: dict[str, int]) -> dict[str, int]:
    """A form's constants: a row's groups are the weights under one scale."""
    if "COLUMNS" not in tile:
        return tile
    width = 16 if family == 14 else 32
    return {"BN": tile["BN"], "GROUPS": tile["COLUMNS"] // width, "WIDTH": width}
