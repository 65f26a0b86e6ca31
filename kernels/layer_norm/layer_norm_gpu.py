"""Layer normalization on the GPU, the host's side: the functions of csrc/bind/layer_norm.cpp, launching either twin."""

from __future__ import annotations

from typing import Any

ROWS = 32  # rows that one piece sums into one partial, as kLayerNormRows


def layer_norm_forward(gpu: Any, y: Any, total: Any, stats: Any, x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> None:
    C = x.shape[-1]
    R = x.size // C if C else 0
    if gpu.twin == "cuda":
        gpu.cuda(f"layer_norm_forward_{_suffix(x)}", (R,), 256, [y, total, stats, x, residual, weight, bias, C, eps])
        return
    stats = gpu.empty((R, 3)) if stats is None else stats
    arguments = {"y": y, "total": total, "stats": stats, "x": x, "residual": residual, "weight": weight, "bias": bias}
    gpu.triton("layer_norm_forward", (R,), arguments | {"C": C, "eps": eps}, BLOCK=1024)


def layer_norm_backward(
    gpu: Any, dx: Any, dweight: Any, dbias: Any, partial: Any, dy: Any, dtotal: Any, x: Any, weight: Any, stats: Any
) -> None:
    C = x.shape[-1]
    R = x.size // C if C else 0
    if R == 0:
        return
    # The parameters' gradients first: dx may take dy's or dtotal's place.
    if dweight is not None or dbias is not None:
        _parameters(gpu, dweight, dbias, partial, dy, x, stats, R, C)
    if gpu.twin == "cuda":
        gpu.cuda(f"layer_norm_backward_x_{_suffix(x)}", (R,), 256, [dx, dy, dtotal, x, weight, stats, C])
        return
    arguments = {"dx": dx, "dy": dy, "dtotal": dtotal, "x": x, "weight": weight, "stats": stats, "C": C}
    gpu.triton("layer_norm_backward_x", (R,), arguments, BLOCK=1024)


def _parameters(gpu: Any, dweight: Any, dbias: Any, partial: Any, dy: Any, x: Any, stats: Any, R: int, C: int) -> None:
    pieces, columns = -(-R // ROWS), -(-C // 256)
    if gpu.twin == "cuda":
        gpu.cuda(f"layer_norm_backward_partial_{_suffix(x)}", (pieces, columns), 256, [partial, dy, x, stats, R, C])
        gpu.cuda("layer_norm_backward_parameters", (columns,), 256, [dweight, dbias, partial, pieces, C])
        return
    arguments = {"partial": partial, "dy": dy, "x": x, "stats": stats, "R": R, "C": C}
    gpu.triton("layer_norm_backward_partial", (pieces, columns), arguments, plain=("R",), ROWS=ROWS, BLOCK=256)
    for part, sums in ((0, dweight), (1, dbias)):
        if sums is not None:
            arguments = {"sums": sums, "partial": partial, "part": part, "pieces": pieces, "C": C}
            gpu.triton("layer_norm_backward_parameters", (columns,), arguments, BLOCK=256, plain=("part", "pieces", "C"))


def _suffix(x: Any) -> str:
    return "bf16" if x.dtype.itemsize == 2 else "fp32"
