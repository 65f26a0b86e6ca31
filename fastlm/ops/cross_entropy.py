"""Softmax cross-entropy and log softmax over the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.ops import check
from fastlm.tensor import data, record, recording, wrap

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(logits: Any, targets: Any, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """-log softmax(logits)[target], over the rows whose target is not `ignore_index`.

    logits: (..., V) float32. targets: (...) int32 or int64. reduction: "mean" and "sum" give a float32 of shape (), "none" (...).
    An ignored row has loss and gradient zero. The mean is over the other rows; where there are none it is 0 (torch gives nan).
    A row of logits with nan or +inf gives nan; -inf is a token that cannot occur. Losses are summed in float64, in row order.
    Raises TypeError for a dtype, ValueError for a shape, a reduction or a target out of range.
    """
    xd = check.array("cross_entropy", "logits", data(logits), at_least=1)
    td, count = check_targets("cross_entropy", targets, xd.shape[:-1], xd.shape[-1], ignore_index, f"logits is {xd.shape}.")
    check_reduction("cross_entropy", reduction, REDUCTIONS)
    recorded = recording(logits)
    scale = 1.0 / max(count, 1) if reduction == "mean" else 1.0

    loss, stats = backend.empty(td.shape), backend.empty((*td.shape, 2))
    # The reduced loss has one gradient for all rows: it is written while the row is in cache, for dy = 1.
    dlogits = backend.empty(xd.shape) if recorded and reduction != "none" else None
    _C.cross_entropy_forward(loss, stats, dlogits, xd, td, ignore_index, scale)
    y = loss if reduction == "none" else np.array(_C.cross_entropy_sum(loss) * scale, np.float32)
    if not recorded:
        return wrap(y, logits)

    def backward(dy: Array) -> Sequence[Array | None]:
        if dlogits is None:
            dx = backend.empty(xd.shape)
            _C.cross_entropy_backward(dx, np.ascontiguousarray(dy), xd, stats, td, ignore_index)
            return (dx,)
        if float(dy) != 1.0:
            _C.scale_add(dlogits, dlogits, float(dy), False)
        return (dlogits,)

    return record(y, (logits,), backward)


def log_softmax(logits: Any) -> Any:
    """logits - logsumexp(logits) over the last axis. logits: (..., V) float32 -> (..., V) float32."""
    xd = check.array("log_softmax", "logits", data(logits), at_least=1)
    y = backend.empty(xd.shape)
    _C.log_softmax(y, xd)
    if not recording(logits):
        return wrap(y, logits)
    return record(y, (logits,), lambda dy: (dy - np.exp(y) * dy.sum(axis=-1, keepdims=True),))


def check_targets(op: str, targets: Any, shape: tuple[int, ...], V: int, ignore_index: int, note: str) -> tuple[Array, int]:
    """targets as int64 of the given shape, every one in range, and how many are not ignored."""
    td = data(targets)
    if not isinstance(td, np.ndarray) or td.dtype not in (np.int32, np.int64):
        got = td.dtype if isinstance(td, np.ndarray) else type(td).__name__
        raise TypeError(f"[{op}] targets must be a NumPy array of int32 or int64, got {got}.")
    check.shape(op, "targets", td, "(...)", shape, note)
    td = np.ascontiguousarray(td, np.int64)
    count, bad = _C.cross_entropy_check(td, V, ignore_index)
    if bad >= 0:
        at = tuple(int(i) for i in np.unravel_index(bad, td.shape))
        raise ValueError(
            f"[{op}] targets must be from 0 to {V - 1} or ignore_index = {ignore_index}, got {int(td.flat[bad])} at {at}."
        )
    return td, int(count)


def check_reduction(op: str, reduction: str, allowed: Sequence[str]) -> None:
    if reduction not in allowed:
        raise ValueError(f"[{op}] reduction must be one of {', '.join(allowed)}, got {reduction!r}.")
