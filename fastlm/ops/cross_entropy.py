"""Softmax cross-entropy and log softmax over the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels, on_device
from fastlm.ops import check
from fastlm.tensor import data, record, recording, wrap

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(logits: Any, targets: Any, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """-log softmax(logits)[target], over the rows whose target is not `ignore_index`.

    logits: (..., V) float32. targets: (...) int32 or int64. reduction: "mean" and "sum" give a float32 of shape (), "none" (...).
    An ignored row has loss and gradient zero. The mean is over the other rows; where there are none it is 0 (torch gives nan).
    A row of logits with nan or +inf gives nan; -inf is a token that cannot occur. Losses are summed in float64, in row order.
    On a device logits may be bfloat16; targets that lie there already are not checked: one out of range gives nan.
    Raises TypeError for a dtype, ValueError for a shape, a reduction or a target out of range.
    """
    xd = check.array("cross_entropy", "logits", data(logits), at_least=1)
    note = f"logits is {xd.shape}."
    td, count = check_targets("cross_entropy", targets, xd.shape[:-1], xd.shape[-1], ignore_index, note, like=xd)
    check_reduction("cross_entropy", reduction, REDUCTIONS)
    recorded = recording(logits)
    scale = loss_scale(td, count, ignore_index, reduction)

    loss, stats = backend.empty(td.shape, like=xd), backend.empty((*td.shape, 2), like=xd)
    # The reduced loss has one gradient for all rows: it is written while the row is in cache, for dy = 1.
    dlogits = backend.empty_like(xd) if recorded and reduction != "none" else None
    kernels(xd).cross_entropy_forward(loss, stats, dlogits, xd, td, ignore_index, scale)
    y = loss if reduction == "none" else reduced(loss, scale)
    if not recorded:
        return wrap(y, logits)

    def backward(dy: Array) -> Sequence[Array | None]:
        if dlogits is None:
            dx = backend.empty_like(xd)
            kernels(xd).cross_entropy_backward(dx, contiguous(dy), xd, stats, td, ignore_index)
            return (dx,)
        return (multiplied(dlogits, dy),)

    return record(y, (logits,), backward)


def log_softmax(logits: Any) -> Any:
    """logits - logsumexp(logits) over the last axis. logits: (..., V) float32 -> (..., V) float32."""
    xd = check.array("log_softmax", "logits", data(logits), at_least=1)
    y = backend.empty_like(xd)
    kernels(xd).log_softmax(y, xd)
    if not recording(logits):
        return wrap(y, logits)

    def backward(dy: Array) -> Sequence[Array | None]:
        if isinstance(dy, np.ndarray):
            return (dy - np.exp(y) * dy.sum(axis=-1, keepdims=True),)
        dx = backend.empty_like(y)
        kernels(y).log_softmax_backward(dx, contiguous(dy), y)
        return (dx,)

    return record(y, (logits,), backward)


def loss_scale(targets: Array, count: int, ignore_index: int, reduction: str) -> Any:
    """What the sum of the losses is multiplied by: a number, or (1,) on the device that the targets are on."""
    if isinstance(targets, np.ndarray):
        return 1.0 / max(count, 1) if reduction == "mean" else 1.0
    scale = backend.empty((1,), like=targets)
    kernels(targets).cross_entropy_scale(scale, targets, ignore_index, reduction == "mean")
    return scale


def reduced(loss: Array, scale: Any) -> Array:
    """The sum of the losses times `loss_scale`, () float32."""
    if isinstance(loss, np.ndarray):
        mean = backend.empty(())
        _C.cross_entropy_sum(mean, loss, scale)
        return mean
    total = backend.empty((), like=loss)
    kernels(loss).cross_entropy_total(total, loss, scale)
    return total


def multiplied(x: Array, dy: Array) -> Array:
    """x times the loss's gradient, (), in place; without work where that is 1."""
    if not isinstance(x, np.ndarray):
        kernels(x).scale_by(x, x, dy, False)
    elif float(dy) != 1.0:
        _C.scale_add(x, x, float(dy), False)
    return x


def check_targets(
    op: str, targets: Any, shape: tuple[int, ...], V: int, ignore_index: int, note: str, like: Any = None
) -> tuple[Array, int]:
    """targets as int64 of the given shape, every one in range, and how many are not ignored.

    Where `like` is on a device: as int32 there. Targets that lie there already are not read: the count is -1.
    """
    td = data(targets)
    if like is not None and on_device(td) and on_device(like):
        if td.dtype not in (np.int32, np.int64):
            raise TypeError(f"[{op}] targets must be int32 or int64, got {td.dtype}.")
        check.shape(op, "targets", td, "(...)", shape, note)
        td = contiguous(td)
        if td.dtype == np.int32:
            return td, -1
        narrow = backend.empty(shape, np.int32, like=td)
        kernels(td).cross_entropy_narrow(narrow, td)
        return narrow, -1
    if not isinstance(td, np.ndarray) or td.dtype not in (np.int32, np.int64):
        got = td.dtype if isinstance(td, np.ndarray) else type(td).__name__
        raise TypeError(f"[{op}] targets must be a NumPy array of int32 or int64, got {got}.")
    check.shape(op, "targets", td, "(...)", shape, note)
    if td.dtype == np.int32 and td.flags.c_contiguous:
        wide = backend.empty(td.shape, np.int64)
        _C.widen(wide, td)
        td = wide
    td = np.ascontiguousarray(td, np.int64) if td.ndim else td.astype(np.int64)  # of () that would make (1,)
    count, bad = _C.cross_entropy_check(td, V, ignore_index)
    if bad >= 0:
        at = tuple(int(i) for i in np.unravel_index(bad, td.shape))
        raise ValueError(
            f"[{op}] targets must be from 0 to {V - 1} or ignore_index = {ignore_index}, got {int(td.flat[bad])} at {at}."
        )
    if like is not None and on_device(like):
        return like.device.put(td.astype(np.int32)), int(count)
    return td, int(count)


def check_reduction(op: str, reduction: str, allowed: Sequence[str]) -> None:
    if reduction not in allowed:
        raise ValueError(f"[{op}] reduction must be one of {', '.join(allowed)}, got {reduction!r}.")
