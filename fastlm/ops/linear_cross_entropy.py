"""The output layer and its loss in one, without ever holding the logits of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import BFLOAT16, Array, contiguous, kernels, on_device
from fastlm.checkpoint.quantized import QuantizedArray, expand
from fastlm.ops import check
from fastlm.ops.cross_entropy import check_reduction, check_targets, loss_scale, multiplied, reduced
from fastlm.ops.linear import linear
from fastlm.ops.matmul import STORAGE, product
from fastlm.tensor import data, leaf, needs_grad, record, recording, wrap

_MOST_ROWS, _LEAST_ROWS = 256, 64
_TERMS = 1 << 12  # of the vocabulary that one chain of dx sums: one of 50,000 errs seven times as much as pieces that are added up
_FREE = 1 << 18  # floats that are held without a thought: a small vocabulary takes all rows at once


def linear_cross_entropy(x: Any, weight: Any, targets: Any, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """cross_entropy(linear(x, weight), targets), for a fraction of the memory and without the rows that are ignored.

    x: (..., C) float32. weight: (V, C) float32; bfloat16, float16 or a QuantizedArray is frozen, it gets no gradient. targets: (...)
    int32 or int64. reduction: "mean" over the rows that are not ignored (0 where all are), or "sum". Returns a float32 of shape ().
    Both gradients are computed here, from each chunk of logits while it is at hand, as in Liger-Kernel (Hsu et al. 2024,
    arXiv:2410.10989); the backward pass hands them on. Raises TypeError for a dtype, ValueError for a shape or a target out of range.
    On a device x and weight are both float32 or both bfloat16, and so are the logits; all rows are computed, and nothing is read back;
    a QuantizedArray is expanded for it as a whole.
    """
    op = "linear_cross_entropy"
    xd = check.array(op, "x", data(x), at_least=1)
    C = xd.shape[-1]
    wd = _weight(op, data(weight))
    if len(wd.shape) != 2 or wd.shape[1] != C:
        raise ValueError(f"[{op}] weight must be (V, C) with C = {C}, got {tuple(wd.shape)}. x is {xd.shape}.")
    V = int(wd.shape[0])
    quantised = isinstance(wd, QuantizedArray)
    check_reduction(op, reduction, ("mean", "sum"))
    if on_device(xd):
        td, _ = check_targets(op, targets, xd.shape[:-1], V, ignore_index, f"x is {xd.shape}.", like=xd)
        return _there(x, weight, xd, wd, td, ignore_index, reduction)
    td, count = check_targets(op, targets, xd.shape[:-1], V, ignore_index, f"x is {xd.shape}.")
    scale = 1.0 / max(count, 1) if reduction == "mean" else 1.0

    rows, ids = xd.reshape(-1, C), td.reshape(-1)
    chosen = None
    if count < ids.size:
        chosen = np.flatnonzero(ids != ignore_index)
        rows, ids = rows[chosen], ids[chosen]
    recorded = recording(x, weight)
    want_x, want_w = recorded and needs_grad(x), recorded and needs_grad(weight) and not quantised and wd.dtype == np.float32
    loss, stats = backend.empty((count,)), backend.empty((count, 2))
    dx = backend.empty((count, C)) if want_x else None
    # The first chunk assigns: the gradient starts as zeros only where there is none.
    dw = (backend.empty if count else backend.zeros)((V, C)) if want_w else None
    chunk = chunk_rows(count, V)
    workspace = backend.empty((0 if quantised else min(chunk, count), V))
    back = wd.dequantize() if quantised and want_x else wd
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        n, piece = end - begin, rows[begin:end]
        if quantised:
            logits = linear(piece, wd)
        else:
            logits = workspace[:n]
            product(logits, piece, wd, n, V, C, b_transposed=True)
        at = slice(begin, end)
        in_place = logits if recorded else None
        _C.cross_entropy_forward(loss[at], stats[at], in_place, logits, ids[at], ignore_index, scale)
        if dx is not None:
            _summed(dx[at], logits, back)
        if dw is not None:
            product(dw, logits, piece, V, C, n, a_transposed=True, accumulate=begin > 0)
    y = reduced(loss, scale)
    if not recorded:
        return wrap(y, x, weight)
    shape = xd.shape

    def backward(dy: Array) -> Sequence[Array | None]:
        return _dx(dx, float(dy), shape, chosen), _dweight(weight, dw, float(dy))

    return record(y, (x, weight), backward)


def _summed(dx: Array, d: Array, w: Array) -> None:
    """dx (n, C) = d (n, V) w (V, C): the sums over _TERMS of V each, one after the other."""
    (n, V), C = d.shape, w.shape[1]
    product(dx, d[:, :_TERMS], w[:_TERMS], n, C, min(V, _TERMS))
    part = backend.empty((n, C)) if V > _TERMS else dx
    for begin in range(_TERMS, V, _TERMS):
        end = min(begin + _TERMS, V)
        product(part, d[:, begin:end], w[begin:end], n, C, end - begin)
        _C.add(dx, part, dx)


_THERE = 1 << 26  # logits that are held at once on a device


def _there(x: Any, weight: Any, xd: Any, wd: Any, td: Any, ignore_index: int, reduction: str) -> Any:
    """The same on a device. A row that is ignored has a zero gradient: which ones are is not known to the host."""
    V, C = wd.shape
    rows, ids = xd.reshape(-1, C), td.reshape(-1)
    R = len(rows)
    recorded = recording(x, weight)
    want_x, want_w = recorded and needs_grad(x), recorded and needs_grad(weight) and not isinstance(wd, QuantizedArray)
    if isinstance(wd, QuantizedArray):  # once for all rows, and for both passes
        quantised, wd = wd, backend.empty_like(rows, (V, C))
        expand(wd, quantised)
    scale = loss_scale(td, -1, ignore_index, reduction)
    loss, stats = backend.empty((R,), like=xd), backend.empty((R, 2), like=xd)
    dx = backend.empty_like(rows) if want_x else None
    dw = (backend.empty if R else backend.zeros)((V, C), like=xd) if want_w else None
    chunk = max(_THERE // max(V, 1) // 128 * 128, 128)
    workspace = backend.empty_like(xd, (min(chunk, R), V))
    for begin in range(0, R, chunk):
        at = slice(begin, min(begin + chunk, R))
        piece = rows[at]
        n = len(piece)
        logits = workspace[:n]
        product(logits, piece, wd, n, V, C, b_transposed=True)
        in_place = logits if recorded else None
        kernels(xd).cross_entropy_forward(loss[at], stats[at], in_place, logits, ids[at], ignore_index, scale)
        if dx is not None:
            product(dx[at], logits, wd, n, C, V)
        if dw is not None:
            product(dw, logits, piece, V, C, n, a_transposed=True, accumulate=begin > 0)
    y = reduced(loss, scale)
    if not recorded:
        return wrap(y, x, weight)

    def backward(dy: Array) -> Sequence[Array | None]:
        given = None if dx is None else multiplied(dx, dy).reshape(xd.shape)
        target = leaf(weight)
        if dw is None:
            return given, None
        if target is not None and target.grad is not None:
            kernels(dw).scale_by(target.grad, dw, dy, True)
            return given, None
        total = multiplied(dw, dy)
        if target is None:
            return given, total
        target.grad = total
        return given, None

    return record(y, (x, weight), backward)


def chunk_rows(n: int, V: int) -> int:
    """Rows whose logits are held at once: a fifth of all, from 64 to 256. More would cost memory, fewer reads of the weight."""
    return max(min(_MOST_ROWS, max(_LEAST_ROWS, -(-n // 40) * 8)), _FREE // max(V, 1))


def _dx(dx: Array | None, dy: float, shape: tuple[int, ...], chosen: Array | None) -> Array | None:
    if dx is None:
        return None
    if dy != 1.0:
        _C.scale_add(dx, dx, dy, False)
    if chosen is None:
        return dx.reshape(shape)
    whole = backend.zeros(shape)
    whole.reshape(-1, shape[-1])[chosen] = dx
    return whole


def _dweight(weight: Any, dw: Array | None, dy: float) -> Array | None:
    """Adds to the gradient of a leaf, or becomes it where there is none yet; else it is returned."""
    if dw is None:
        return None
    target = leaf(weight)
    if target is not None and target.grad is not None:
        _C.scale_add(target.grad, dw, dy, True)
        return None
    if dy != 1.0:
        _C.scale_add(dw, dw, dy, False)
    if target is None:
        return dw
    target.grad = dw
    return None


def _weight(op: str, w: Any) -> Any:
    if on_device(w):
        if w.dtype not in (np.float32, BFLOAT16):
            raise TypeError(f"[{op}] weight must be float32 or bfloat16 on a device, got {w.dtype}.")
        return contiguous(w)
    if isinstance(w, QuantizedArray):
        return w
    if not isinstance(w, np.ndarray):
        raise TypeError(f"[{op}] weight must be a NumPy array, a Tensor or a QuantizedArray, got {type(w).__name__}.")
    if w.dtype not in STORAGE:
        raise TypeError(
            f"[{op}] weight must be float32, bfloat16 or float16, got {w.dtype}. Convert it with weight.astype('float32')."
        )
    return np.ascontiguousarray(w)
