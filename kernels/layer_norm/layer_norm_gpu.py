"""Layer normalization on the GPU, the host's side: the functions of csrc/bind/layer_norm.cpp, launching either twin."""

from __future__ import annotations

from typing import Any

PIECES = 384  # at most so many partial sums over rows: about three blocks for each multiprocessor of a large card
WIDE = 8192  # columns whose sums fit into shared memory


def layer_norm_forward(gpu: Any, y: Any, total: Any, stats: Any, x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> None:
    C = x.shape[-1]
    R = x.size // C if C else 0
    if gpu.twin == "cuda":
        form = _form(x, C)
        form = "warp" if form == "block" and C <= 1024 else form
        arguments = [y, total, stats, x, residual, weight, bias, R, C, eps]
        gpu.cuda(f"layer_norm_forward_{form}_{_suffix(x)}", (-(-R // 8) if form == "warp" else R,), 256, arguments)
        return
    fused, biased = residual is not None, bias is not None
    arguments = {"y": y, "total": total if fused else y, "stats": gpu.empty((R, 3)) if stats is None else stats, "x": x}
    arguments |= {"residual": residual if fused else x, "weight": weight, "bias": bias if biased else weight}
    arguments |= {"fused": int(fused), "biased": int(biased), "C": C, "eps": eps}
    block, warps = _kept(C)
    plain = ("fused", "biased") if block else ("fused", "biased", "C")
    gpu.triton("layer_norm_forward", (R,), arguments, plain=plain, warps=warps, BLOCK=block or 1024, KEPT=block > 0)


def layer_norm_backward(
    gpu: Any, dx: Any, dweight: Any, dbias: Any, partial: Any, dy: Any, dtotal: Any, x: Any, weight: Any, stats: Any
) -> None:
    """`partial` is not used: what is summed in which order depends on the shape alone, and is the twin's own."""
    C = x.shape[-1]
    R = x.size // C if C else 0
    if R == 0:
        return
    rows = -(-R // PIECES)
    pieces = -(-R // rows)
    sums = None if dweight is None and dbias is None else gpu.empty((pieces, 2, C))
    if gpu.twin == "cuda":
        own = sums if C <= WIDE else None
        if sums is not None and own is None:  # first, since dx may take dy's place
            gpu.cuda(f"layer_norm_backward_partial_{_suffix(x)}", (pieces, -(-C // 256)), 256, [sums, dy, x, stats, R, C, rows])
        arguments = [dx, own, dy, dtotal, x, weight, stats, R, C, rows]
        shared = 0 if own is None else 8 * C
        gpu.cuda(f"layer_norm_backward_{_form(x, C)}_{_suffix(x)}", (pieces,), 256, arguments, shared=shared)
        if sums is not None:
            gpu.cuda("layer_norm_backward_parameters", (-(-C // 32), 2), 512, [dweight, dbias, sums, pieces, C])
        return
    added = {"dtotal": dy if dtotal is None else dtotal, "x": x, "weight": weight, "stats": stats, "added": int(dtotal is not None)}
    block, warps = _kept(C)
    if sums is not None and block:
        arguments = {"dx": dx, "partial": sums, "dy": dy} | added | {"R": R, "C": C, "rows": rows}
        gpu.triton("layer_norm_backward", (pieces,), arguments, plain=("added", "R", "rows"), warps=warps, BLOCK=block)
    else:
        if sums is not None:
            arguments = {"partial": sums, "dy": dy, "x": x, "stats": stats, "R": R, "C": C, "rows": rows}
            grid = (pieces, -(-C // 128))
            gpu.triton("layer_norm_backward_partial", grid, arguments, plain=("R", "C", "rows"), TILE=16, BLOCK=128)
        gpu.triton("layer_norm_backward_x", (R,), {"dx": dx, "dy": dy} | added | {"C": C}, plain=("added", "C"), BLOCK=1024)
    for part, to in ((0, dweight), (1, dbias)):
        if to is not None:
            arguments = {"sums": to, "partial": sums, "part": part, "pieces": pieces, "C": C}
            plain = ("part", "pieces", "C")
            gpu.triton("layer_norm_backward_parameters", (-(-C // 32),), arguments, plain=plain, TILE=32, BLOCK=32)


def _form(x: Any, C: int) -> str:
    return "any" if C % (16 // x.dtype.itemsize) else "block"


def _kept(C: int) -> tuple[int, int]:
    """The Triton block that holds a row of whole vectors, and its warps; 0 where the row is taken in pieces."""
    if C % 16 or C > 4096:
        return 0, 4
    return (1024, 4) if C <= 1024 else (4096, 8)


def _suffix(x: Any) -> str:
    return "bf16" if x.dtype.itemsize == 2 else "fp32"
