"""Position and segment scores of Transformer-XL on the GPU, the host's side: the functions of csrc/bind/rel_shift.cpp, and what NumPy
does beside them on the CPU."""

from __future__ import annotations

from typing import Any

from fastlm.cuda.array import retyped as _retyped

_TILE = {"ROWS": 32, "POINTS": 32, "COLUMNS": 64}
_ROWS = {"ROWS": 32, "COLUMNS": 64}
_SIZES = ("T", "H", "D", "S", "P")
# On tensor cores (tools/gpu_build.py --check); a tile's 32 rows are too few for the larger instructions.
EXPECTS = {f"rel_shift_{k} *:?bf16 *": dict.fromkeys(("80", "90", "100"), "HMMA") for k in ("forward", "backward_q", "backward_r")}


def rel_shift_forward(
    gpu: Any,
    out: Any,
    q: Any,
    u: Any,
    r: Any,
    positions: int,
    starts: Any,
    segment: Any,
    query_segments: Any,
    key_segments: Any,
    mask: Any,
    scale: float,
) -> None:
    """r as it is, (P, H, D); mask float32."""
    (B, T, H, D), S, spare, number = q.shape, out.shape[-1], _retyped(q, "float32"), _retyped(q, "int32")
    if out.size == 0:
        return
    arguments = {"out": out, "q": q, "u": u, "r": r, "starts": starts}
    arguments |= {"segment": spare, "query_segments": number, "key_segments": number, "mask": spare if mask is None else mask}
    if segment is not None:
        arguments |= {"segment": segment, "query_segments": query_segments, "key_segments": key_segments}
    arguments |= {"T": T, "H": H, "D": D, "S": S, "P": positions}
    arguments |= {"segmented": int(segment is not None), "masked": int(mask is not None), "scale": scale}
    grid = (B * H * -(-T // 32), -(-positions // 64))
    plain = (*_SIZES, "segmented", "masked")
    gpu.triton("rel_shift_forward", grid, arguments, plain=plain, stages=1, ROWS=32, POINTS=64, COLUMNS=32)


def rel_shift_backward(
    gpu: Any,
    dq: Any,
    dr: Any,
    dterm: Any,
    dout: Any,
    q: Any,
    u: Any,
    r: Any,
    starts: Any,
    query_segments: Any,
    key_segments: Any,
    scale: float,
) -> None:
    (B, T, H, D), S, P, spare, number = q.shape, dout.shape[-1], r.shape[0], _retyped(q, "float32"), _retyped(q, "int32")
    sizes = {"T": T, "H": H, "D": D, "S": S, "P": P}
    segmented = dterm is not None
    arguments = {"dq": dq, "dterm": dterm if segmented else spare, "dout": dout, "r": r, "starts": starts}
    arguments |= {"query_segments": query_segments if segmented else number, "key_segments": key_segments if segmented else number}
    arguments |= sizes | {"segmented": int(segmented), "scale": scale}
    grid = (B * H * -(-T // 32), -(-D // 64))
    gpu.triton("rel_shift_backward_q", grid, arguments, plain=(*_SIZES, "segmented"), stages=1, **_TILE)
    if dr is not None:
        arguments = {"dr": dr, "dout": dout, "q": q, "u": u, "starts": starts, "B": B} | sizes | {"scale": scale}
        tile = _TILE | {"ROWS": 16}
        gpu.triton("rel_shift_backward_r", (H * -(-P // 32), -(-D // 64)), arguments, plain=("B", *_SIZES), stages=1, **tile)


def rel_shift_term(gpu: Any, term: Any, q: Any, bias: Any, embedding: Any, scale: float) -> None:
    """term (B, H, T, 2) float32 = scale (q + bias) . embedding: the segment scores."""
    B, T, H, D = q.shape
    arguments = {"term": term, "q": q, "bias": bias, "embedding": embedding} | _some(B, T, H, D, scale)
    gpu.triton("rel_shift_term", (-(-B * T // 32), H), arguments, plain=("rows", "T", "H", "D"), stages=1, **_ROWS)


def rel_shift_backward_term(gpu: Any, dq: Any, sums: Any, dterm: Any, q: Any, bias: Any, embedding: Any, scale: float) -> None:
    """dq += the segment scores'; sums (3, H, D) float32 = the gradients of embedding and, last, of bias."""
    B, T, H, D = q.shape
    pieces = -(-B * T // 32)
    partial = gpu.empty((pieces, *sums.shape))
    arguments = {"dq": dq, "partial": partial, "dterm": dterm, "q": q, "bias": bias, "embedding": embedding}
    arguments |= _some(B, T, H, D, scale)
    grid = (pieces, H, -(-D // 64))
    gpu.triton("rel_shift_backward_term", grid, arguments, plain=("rows", "T", "H", "D"), stages=1, **_ROWS)
    rel_shift_sum(gpu, sums, partial)


def rel_shift_sum(gpu: Any, sums: Any, x: Any) -> None:
    """sums (...) float32 = those of x (R, ...)."""
    C = sums.size
    arguments = {"sums": sums, "x": x, "R": x.size // C if C else 0, "C": C}
    gpu.triton("rel_shift_sum", (-(-C // 32),), arguments, plain=("R", "C"), stages=1, ROWS=32, COLUMNS=32)


def rel_shift_narrow(gpu: Any, x: Any) -> Any:
    """Numbers of segments, int32 or int64, as int32."""
    if x.dtype.itemsize == 4:
        return x
    to = gpu.empty(x.shape, "int32")
    gpu.triton("rel_shift_narrow", (-(-x.size // 1024),), {"to": to, "x": x, "N": x.size}, plain=("N",), stages=1, BLOCK=1024)
    return to


def _some(B: int, T: int, H: int, D: int, scale: float) -> dict[str, Any]:
    return {"rows": B * T, "T": T, "H": H, "D": D, "scale": scale}
