"""Matrix products and linear layers on the GPU, the host's side: the functions of csrc/bind/matmul.cpp."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm.kernels.matmul import matmul_tiles as tiles

# Tiles of 64 and more rows must use Hopper's tensor cores by warpgroups: tools/gpu_build.py --check. A few rows use those of a warp.
_TILES, _MMA = {"90": "HGMMA", "80": "HMMA"}, {"90": "HMMA", "80": "HMMA"}
_KERNELS = "matmul", "grouped_rows", "grouped_weights"
EXPECTS = {f"{k} * a:?bf16 b:?bf16 * BM={rows} *": _TILES for k in _KERNELS for rows in (64, 128)}
EXPECTS |= {f"{k} * a:?bf16 b:?bf16 * BM=16 *": _MMA for k in _KERNELS[:2]}
# The CUDA C++ kernels likewise, and copies that run beside the products.
EXPECTS |= {
    "matmul_bf16_*": _MMA,
    "matmul_bf16_bf16_*": {"80": "LDGSTS", "90": "LDGSTS"},
    "hopper_*": {"90": "HGMMA"},
    "hopper_*_*": {"90": "UTMALDG"},
}
_ROWS = 32  # rows that one piece sums into one partial, as kLinearRows


def matmul(
    gpu: Any, c: Any, z: Any, a: Any, b: Any, bias: Any, residual: Any, batch: int, M: int, N: int, K: int, a_step: int, b_step: int,
    a_transposed: bool, b_transposed: bool, b_type: int, accumulate: bool, activation: int,
) -> None:  # fmt: skip
    """c (batch, M, N) = or += a b; a, z, residual and bias have the dtype of the rows, c may be float32 where a is bfloat16.

    Raises TypeError where the dtypes do not go together.
    """
    if not (batch and M and N):
        return
    for name, step, size in (("a", a_step, M * K), ("b", b_step, K * N)):
        if batch > 1 and step not in (0, size):
            raise ValueError(f"[matmul] the matrices of {name} must follow one another, {size} elements, got a step of {step}.")
    types, layout = (_type(a), _type(b), _type(c)), (a_transposed, b_transposed)
    if not tiles.listed(types, layout):
        raise TypeError(
            f"[matmul] a, b and c must be float32 or bfloat16 that go together, got {a.dtype}, {b.dtype} and {c.dtype}."
        )
    for name, x, like in (("bias", bias, a), ("residual", residual, c), ("z", z, c)):
        if x is not None and x.dtype != like.dtype:
            raise TypeError(f"[matmul] {name} must be {like.dtype}, as the rows are, got {x.dtype}.")
    flags = sum(
        bit
        for bit, there in (
            (1, bias is not None),
            (2, z is not None),
            (4, residual is not None),
            (8, accumulate),
            (16, batch > 1 and a_step > 0),
            (32, batch > 1 and b_step > 0),
        )
        if there
    )
    if gpu.twin == "cuda" and _cuda(gpu, [c, z, a, b, bias, residual], types, layout, (M, N, K), batch, flags, activation):
        return
    tile, plain = tiles.form(types, layout, {"M": M, "N": N, "K": K}, batch)
    arguments = {
        "c": c,
        "z": c if z is None else z,
        "a": a,
        "b": b,
        "bias": a if bias is None else bias,
        "residual": c if residual is None else residual,
    }
    sizes = {"M": M, "N": N, "K": K, "flags": flags, "activation": activation}
    grid = -(-M // tile[0]["BM"]) * -(-N // tile[0]["BN"]) * batch
    gpu.triton(
        "matmul", (grid,), arguments | sizes, plain=(*plain, "flags", "activation"),
        A_T=a_transposed, B_T=b_transposed, **tiles.launch(tile),
    )  # fmt: skip


def _cuda(
    gpu: Any, arrays: list[Any], types: tuple[str, str, str], layout: tuple[bool, bool], sizes: tuple[int, int, int], batch: int,
    flags: int, activation: int,
) -> bool:  # fmt: skip
    """Launches the CUDA C++ kernel that suits the product; whether there is one, else Triton's is the better or the only one."""
    (M, N, K), half, row_lengths = sizes, types[:2] == (tiles.HALF, tiles.HALF), tiles.ROWS[layout]
    if any(x is not None and x.pointer % 16 for x in arrays):
        return False
    if layout == (False, True) and M <= 16 and K % 16 == 0:
        return False  # a few rows: Triton has a form for reading the weight
    large = -(-M // 128) * -(-N // 128) * batch
    name, numbers = _name(types, layout), [M, N, K, flags, activation]
    if not half:
        gpu.cuda(f"matmul_{name}", (large,), 256, [*arrays, *numbers], shared=4 * 16 * 132 * 4)
        return True
    if any(n % 8 for size, n in zip(tiles.ALL, sizes, strict=True) if size in row_lengths):
        return False  # rows that do not begin at whole vectors
    processors = gpu.device.multiprocessors
    if 2 * large < processors:
        return False  # Triton's smaller tiles give more processors something to do
    major = gpu.device.capability[0]
    if major >= 10:
        return False  # Triton knows the tensor cores of these
    wide = processors <= -(-M // 128) * -(-N // 256)
    hopper = f"hopper_{types[2].removeprefix('*')}_{name[-2:]}_{256 if wide else 128}"
    if major == 9 and batch == 1 and K >= 64 and hopper in _HOPPER:
        c, z, a, b, bias, residual = arrays
        maps = [_map(gpu, a, 64 if layout[0] else 128), _map(gpu, b, (256 if wide else 128) if layout[1] else 64)]
        shared = (4 * 49152 if wide else 6 * 32768) + 128  # stages and their barriers
        tiles_there = -(-M // 128) * -(-N // (256 if wide else 128))
        gpu.cuda(hopper, (min(tiles_there, processors),), 384, [c, z, *maps, bias, residual, *numbers], shared=shared)
        return True
    gpu.cuda(f"matmul_{name}", (large,), 256, [*arrays, *numbers], shared=65536)
    return True


_HOPPER = {
    *(f"hopper_bf16_{layout}_{width}" for layout in ("nn", "nt") for width in (128, 256)),
    *("hopper_fp32_nt_256", "hopper_fp32_tn_128", "hopper_fp32_tn_256"),
}  # fmt: skip


def _map(gpu: Any, x: Any, rows: int) -> bytes:
    """A matrix of bfloat16 for TMA, in boxes of so many rows and 64 columns."""
    columns = x.shape[-1]
    made: bytes = gpu.device.tensor_map(x.pointer, x.size // columns, columns, 2 * columns, rows, 64)
    return made


def _name(types: tuple[str, str, str], layout: tuple[bool, bool]) -> str:
    return "_".join([*(t.removeprefix("*") for t in types), "".join("nt"[t] for t in layout)])


def linear_backward(gpu: Any, dz: Any, dbias: Any, partial: Any, dy: Any, z: Any, activation: int) -> None:
    N = dy.shape[-1]
    M = dy.size // N if N else 0
    if not M:
        return
    pieces, flags = -(-M // _ROWS), (1 if dz is not None else 0) + (2 if dbias is not None else 0)
    arguments = {"dz": dy if dz is None else dz, "partial": partial if dbias is not None else gpu.empty((0,))}
    arguments |= {"dy": dy, "z": dy if z is None else z, "M": M, "N": N, "flags": flags, "activation": activation}
    plain = "M", "N", "flags", "activation"
    gpu.triton("linear_backward", (pieces * -(-N // 64),), arguments, plain=plain, ROWS=_ROWS, BLOCK=64)
    if dbias is not None:
        arguments = {"dbias": dbias, "partial": partial, "pieces": pieces, "N": N}
        gpu.triton("linear_bias", (-(-N // 32),), arguments, plain=("pieces", "N"), ROWS=32, BLOCK=32)


def linear_activation(gpu: Any, y: Any, z: Any, activation: int) -> None:
    N = z.shape[-1] if z.shape else 1
    M = z.size // N if N else 0
    arguments = {"y": y, "z": z, "M": M, "N": N, "activation": activation}
    gpu.triton("linear_activation", (-(-z.size // 1024),), arguments, plain=("M", "N", "activation"), BLOCK=1024)


def grouped_linear(gpu: Any, y: Any, z: Any, x: Any, counts: Any, weights: Any, how: Any, types: Any, activation: int) -> None:
    """y (P, N) = act(x_e W_e^T) by runs of rows; counts (E,) int64 on the device, weights E arrays (N, K). z as in `matmul`."""
    _rows(gpu, y, z, x, counts, weights, True, activation)


def grouped_linear_dx(gpu: Any, dx: Any, dy: Any, counts: Any, weights: Any) -> None:
    """dx (P, K) = dy_e W_e by runs of rows."""
    _rows(gpu, dx, None, dy, counts, weights, False, 0)


def grouped_linear_dweights(gpu: Any, dweights: Any, dy: Any, x: Any, counts: Any) -> None:
    """dweights, E arrays (N, K) float32, += dy_e^T x_e over each expert's run of rows."""
    E, P, M, N = len(dweights), x.shape[0], dy.shape[1], x.shape[1]
    if not (E and P and M and N):
        return
    kinds, layout = (_type(dy), _type(x), tiles.WIDE), (True, False)
    _known("grouped_linear", kinds, layout)
    tile, plain = tiles.group_form(kinds, layout, {"M": M, "N": N, "K": P}, E)
    arguments = {"c": dweights[0], "offsets": _offsets(gpu, dweights), "a": dy, "b": x, "counts": counts, "E": E, "M": M, "N": N}
    grid = E * -(-M // tile[0]["BM"]) * -(-N // tile[0]["BN"])
    gpu.triton("grouped_weights", (grid,), arguments, plain=("E", *plain), EXPERTS=tiles.EXPERTS, **tiles.launch(tile))


def _rows(gpu: Any, c: Any, z: Any, a: Any, counts: Any, weights: Any, b_t: bool, activation: int) -> None:
    E, (P, N), K = len(weights), c.shape, a.shape[1]
    if not (E and P and N):
        return
    kinds, layout = (_type(a), _type(weights[0]), _type(c)), (False, b_t)
    _known("grouped_linear", kinds, layout)
    tile, plain = tiles.group_form(kinds, layout, {"M": P, "N": N, "K": K}, E)
    arguments = {"c": c, "z": c if z is None else z, "a": a, "b": weights[0], "offsets": _offsets(gpu, weights), "counts": counts}
    sizes = {"E": E, "N": N, "K": K, "flags": 0 if z is None else 2, "activation": activation}
    most = -(-P // tile[0]["BM"]) + min(E, P)  # tiles of rows: every run may leave one that is not full
    gpu.triton(
        "grouped_rows", (most * -(-N // tile[0]["BN"]),), arguments | sizes, plain=("E", "flags", "activation", *plain),
        B_T=b_t, EXPERTS=tiles.EXPERTS, **tiles.launch(tile),
    )  # fmt: skip


_tables: dict[Any, Any] = {}  # kept, so that a recorded step finds its table


def _offsets(gpu: Any, arrays: Any) -> Any:
    """How many elements each array begins after the first, (E,) int64 on the device."""
    at = tuple((x.pointer - arrays[0].pointer) // x.dtype.itemsize for x in arrays)
    key = id(gpu.device), at
    if key not in _tables:
        if len(_tables) >= 256:
            _tables.clear()
        _tables[key] = gpu.device, gpu.device.constant(np.array(at, np.int64))
    gpu.device.keep(_tables[key][1])
    return _tables[key][1]


def _known(op: str, types: tuple[str, str, str], layout: tuple[bool, bool]) -> None:
    if not tiles.listed(types, layout):
        names = [t.removeprefix("*") for t in types]
        raise TypeError(f"[{op}] rows, weights and result must be float32 or bfloat16 that go together, got {', '.join(names)}.")


def _type(x: Any) -> str:
    """The pointer type in Triton's words."""
    return {"float32": tiles.WIDE, "bfloat16": tiles.HALF}.get(x.dtype.name, str(x.dtype))
