"""Products with ggml's blocks on the GPU, the host's side: the function of csrc/bind/quantized_matmul.cpp, on blocks as a file has them."""

from __future__ import annotations

from typing import Any

from fastlm.kernels.matmul.matmul_gpu import _offsets
from fastlm.kernels.matmul.matmul_tiles import EXPERTS as _EXPERTS

# Forms by the dtype of x: the most rows, the kernel, its constants (COLUMNS of a part in a step), options. The first that fits is taken.
# float32 has no tensor cores to feed: its tiles are small, and few rows are read one by one.
FORMS: dict[str, list[tuple[int, str, dict[str, int], dict[str, int]]]] = {
    "float32": [
        (8, "quantized_row", {"BN": 8, "COLUMNS": 256}, {"num_warps": 4, "num_stages": 3}),
        (1 << 31, "quantized_tile", {"BM": 32, "BN": 32, "COLUMNS": 32}, {"num_warps": 8, "num_stages": 3}),
    ],
    "bfloat16": [
        (1, "quantized_row", {"BN": 8, "COLUMNS": 256}, {"num_warps": 4, "num_stages": 3}),
        (16, "quantized_tile", {"BM": 16, "BN": 32, "COLUMNS": 64}, {"num_warps": 4, "num_stages": 3}),
        (1 << 31, "quantized_tile", {"BM": 64, "BN": 64, "COLUMNS": 32}, {"num_warps": 8, "num_stages": 3}),
    ],
}
# Of runs of rows: the most rows an expert has on the average, the tile, its warps. Their addresses take registers, so float32 has smaller
# tiles and the large tile of bfloat16 more warps.
GROUPED: dict[str, list[tuple[int, dict[str, int], int]]] = {
    "float32": [(1 << 31, {"BM": 16, "BN": 32, "COLUMNS": 32}, 4)],
    "bfloat16": [(16, {"BM": 16, "BN": 32, "COLUMNS": 64}, 4), (1 << 31, {"BM": 64, "BN": 64, "COLUMNS": 32}, 8)],
}
# Kinds that one kernel decodes -> how far the high part lies behind the low one, weights of a group's part.
FAMILIES = {2: (16, 16), 8: (16, 16), 12: (32, 32), 14: (64, 16)}
# ggml's number of a kind -> its family, form: 1 there are minima, 2 there are fifth bits.
KINDS = {2: (2, 0), 3: (2, 1), 6: (2, 2), 7: (2, 3), 8: (8, 0), 12: (12, 1), 13: (12, 3), 14: (14, 0)}

# Tiles of bfloat16 must use tensor cores: tools/gpu_build.py --check.
EXPECTS: dict[str, dict[str, str]] = {}
for _kernel in ("quantized_tile", "quantized_group"):
    EXPECTS |= {f"{_kernel} * x:?bf16 *": {"80": "HMMA"}, f"{_kernel} * x:?bf16 * BM=16 *": {"90": "HMMA"}}
    EXPECTS |= {f"{_kernel} * x:?bf16 * BM=64 *": {"90": "HGMMA"}}


def quantized_matmul(
    gpu: Any, c: Any, z: Any, x: Any, blocks: Any, bias: Any, residual: Any, M: int, N: int, K: int, kind: int, activation: int
) -> None:
    """c (M, N) = act(x blocks^T + bias) + residual; z, where it is wanted, is what the activation is applied to.

    Raises TypeError where the dtypes do not go together.
    """
    if not (M and N):
        return
    check_together("quantized_matmul", x, c=c, z=z, bias=bias, residual=residual)
    family, form = KINDS[kind]
    _, kernel, sizes, options = next(f for f in FORMS[x.dtype.name] if f[0] >= M)
    arguments = {"c": c, "z": c if z is None else z, "x": x, "blocks": blocks}
    arguments |= rest(c, z, x, bias, residual, activation) | {"M": M, "N": N, "K": K, "form": form}
    grid = -(-M // sizes.get("BM", 1)) * -(-N // sizes["BN"])
    gpu.triton(
        kernel, (grid,), arguments, plain=("M", "N", "form", "flags", "activation"),
        warps=options["num_warps"], stages=options["num_stages"], **_constants(family, sizes),
    )  # fmt: skip


def grouped_quantized(gpu: Any, y: Any, z: Any, x: Any, counts: Any, weights: Any, kind: int, activation: int) -> None:
    """y (P, N) = act(x_e W_e^T) by runs of rows; counts (E,) int64 on the device, weights the blocks of E matrices of one kind."""
    E, (P, N), K = len(weights), y.shape, x.shape[1]
    if not (E and P and N):
        return
    family, form = KINDS[kind]
    sizes, warps = next((t, w) for most, t, w in GROUPED[x.dtype.name] if most * E >= P)
    arguments = {"c": y, "z": y if z is None else z, "x": x, "blocks": weights[0], "offsets": _offsets(gpu, weights)}
    arguments |= {"counts": counts, "E": E, "N": N, "K": K, "form": form, "flags": 0 if z is None else 2, "activation": activation}
    most = -(-P // sizes["BM"]) + min(E, P)  # tiles of rows: every run may leave one that is not full
    gpu.triton(
        "quantized_group", (most * -(-N // sizes["BN"]),), arguments, plain=("E", "N", "form", "flags", "activation"),
        warps=warps, EXPERTS=_EXPERTS, **_constants(family, sizes),
    )  # fmt: skip


def _constants(family: int, sizes: dict[str, int]) -> dict[str, int]:
    """A form's constants for a family of kinds."""
    high, width = FAMILIES[family]
    tile = {n: v for n, v in sizes.items() if n != "COLUMNS"}
    return {"FAMILY": family, "HIGH": high, "WIDTH": width, "GROUPS": sizes["COLUMNS"] // width, **tile}


def check_together(op: str, x: Any, **given: Any) -> None:
    """TypeError unless x is float32 or bfloat16 and the others, which may be None, are what x is."""
    if x.dtype.name not in ("float32", "bfloat16"):
        raise TypeError(f"[{op}] x must be float32 or bfloat16, got {x.dtype}.")
    for name, array in given.items():
        if array is not None and array.dtype != x.dtype:
            raise TypeError(f"[{op}] {name} must be {x.dtype}, as x is, got {array.dtype}.")


def rest(c: Any, z: Any, x: Any, bias: Any, residual: Any, activation: int) -> dict[str, Any]:
    """What follows the sums, as a kernel takes it."""
    flags = (1 if bias is not None else 0) + (2 if z is not None else 0) + (4 if residual is not None else 0)
    return {"bias": x if bias is None else bias, "residual": c if residual is None else residual} | {
        "flags": flags,
        "activation": activation,
    }
