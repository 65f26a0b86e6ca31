"""RMS normalization on the GPU, the host's side: the functions of csrc/bind/rms_norm.cpp, launching either twin."""

from __future__ import annotations

from typing import Any

PIECES = 384  # at most so many partial sums over rows: about three blocks for each multiprocessor of a large card
WIDE = 16384  # columns whose sums fit into shared memory


def rms_norm_forward(gpu: Any, y: Any, total: Any, rstd: Any, x: Any, residual: Any, weight: Any, eps: float) -> None:
    C = x.shape[-1]
    R = x.size // C if C else 0
    if gpu.twin == "cuda":
        form = _form(x, C)
        form = "warp" if form == "block" and C <= 1024 else form
        arguments = [y, total, rstd, x, residual, weight, R, C, eps]
        gpu.cuda(f"rms_norm_forward_{form}_{_suffix(x)}", (-(-R // 8) if form == "warp" else R,), 256, arguments)
        return
    fused = residual is not None
    arguments = {"y": y, "total": total if fused else y, "rstd": gpu.empty((R,)) if rstd is None else rstd, "x": x}
    arguments |= {"residual": residual if fused else x, "weight": weight, "fused": int(fused), "C": C, "eps": eps}
    block, warps = _kept(C)
    plain = ("fused",) if block else ("fused", "C")
    gpu.triton("rms_norm_forward", (R,), arguments, plain=plain, warps=warps, BLOCK=block or 1024, KEPT=block > 0)


def rms_norm_backward(gpu: Any, dx: Any, dweight: Any, partial: Any, dy: Any, dtotal: Any, x: Any, weight: Any, rstd: Any) -> None:
    """`partial` is not used: what is summed in which order depends on the shape alone, and is the twin's own."""
    C = x.shape[-1]
    R = x.size // C if C else 0
    if R == 0:
        return
    rows = -(-R // PIECES)
    pieces = -(-R // rows)
    sums = None if dweight is None else gpu.empty((pieces, C))
    if gpu.twin == "cuda":
        own = sums if C <= WIDE else None
        if sums is not None and own is None:  # first, since dx may take dy's place
            gpu.cuda(f"rms_norm_backward_partial_{_suffix(x)}", (pieces, -(-C // 256)), 256, [sums, dy, x, rstd, R, C, rows])
        arguments = [dx, own, dy, dtotal, x, weight, rstd, R, C, rows]
        shared = 0 if own is None else 4 * C
        gpu.cuda(f"rms_norm_backward_{_form(x, C)}_{_suffix(x)}", (pieces,), 256, arguments, shared=shared)
        if sums is not None:
            gpu.cuda("rms_norm_backward_parameters", (-(-C // 32),), 512, [dweight, sums, pieces, C])
        return
    added = {"dtotal": dy if dtotal is None else dtotal, "x": x, "weight": weight, "rstd": rstd, "added": int(dtotal is not None)}
    block, warps = _kept(C)
    if sums is not None and block:
        arguments = {"dx": dx, "partial": sums, "dy": dy} | added | {"R": R, "C": C, "rows": rows}
        gpu.triton("rms_norm_backward", (pieces,), arguments, plain=("added", "R", "rows"), warps=warps, BLOCK=block)
    else:
        if sums is not None:
            arguments = {"partial": sums, "dy": dy, "x": x, "rstd": rstd, "R": R, "C": C, "rows": rows}
            grid = (pieces, -(-C // 128))
            gpu.triton("rms_norm_backward_partial", grid, arguments, plain=("R", "C", "rows"), TILE=16, BLOCK=128)
        gpu.triton("rms_norm_backward_x", (R,), {"dx": dx, "dy": dy} | added | {"C": C}, plain=("added", "C"), BLOCK=1024)
    if sums is not None:
        arguments = {"dweight": dweight, "partial": sums, "pieces": pieces, "C": C}
        gpu.triton("rms_norm_backward_parameters", (-(-C // 32),), arguments, plain=("pieces", "C"), TILE=32, BLOCK=32)


def _form(x: Any, C: int) -> str:
    return "any" if C % (16 // x.dtype.itemsize) else "block"


def _kept(C: int) -> tuple[int, int]:
    """The Triton block that holds a row of whole vectors, and its warps; 0 where the row is taken in pieces."""
    if C % 16 or C > 4096:
        return 0, 4
    return (1024, 4) if C <= 1024 else (4096, 8)


def _suffix(x: Any) -> str:
    return "bf16" if x.dtype.itemsize == 2 else "fp32"
