"""Losses over a few numbers a sequence or token, by NumPy: mean squared error, binary cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import data, record, recording, wrap


def mean_squared_error(x: Any, targets: Any) -> Any:
    """mean((x - targets)^2), a float32 of shape (). x: any shape, float32; targets: the same shape, numbers. Summed in float64."""
    xd = check.any_array("mean_squared_error", "x", data(x), np.float32)
    if not isinstance(xd, np.ndarray):
        return _there("mean_squared_error", x, xd, targets, False)
    td = np.asarray(targets, np.float64)
    check.shape("mean_squared_error", "targets", td, "the shape of x", xd.shape)
    error = xd - td
    y = np.array(np.square(error).mean(), np.float32)
    if not recording(x):
        return wrap(y, x)
    return record(y, (x,), lambda dy: ((error * (2 * float(dy) / error.size)).astype(np.float32),))


def binary_cross_entropy(logits: Any, targets: Any, ignore_index: int = -100) -> Any:
    """mean of -t log p - (1 - t) log(1 - p), p = sigmoid(logits), over the targets that are not `ignore_index`; 0 where there are none.

    logits: any shape, float32; targets: the same shape, from 0 to 1. Returns a float32 of shape (). Computed in float64.
    """
    xd = check.any_array("binary_cross_entropy", "logits", data(logits), np.float32)
    if not isinstance(xd, np.ndarray):
        return _there("binary_cross_entropy", logits, xd, targets, True, ignore_index)
    td = np.asarray(targets, np.float64)
    check.shape("binary_cross_entropy", "targets", td, "the shape of logits", xd.shape)
    counted = td != ignore_index
    if ((td < 0) | (td > 1))[counted].any():
        raise ValueError(f"[binary_cross_entropy] targets must be from 0 to 1, or {ignore_index} where they do not count.")
    x, count = xd.astype(np.float64), max(int(counted.sum()), 1)
    loss = np.maximum(x, 0) - x * td + np.log1p(np.exp(-np.abs(x)))
    y = np.array(loss[counted].sum() / count, np.float32)
    if not recording(logits):
        return wrap(y, logits)

    def backward(dy: Any) -> Any:
        sigmoid = np.where(x >= 0, 1, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))
        return (np.where(counted, (sigmoid - td) * (float(dy) / count), 0).astype(np.float32),)

    return record(y, (logits,), backward)


def _there(op: str, x: Any, xd: Array, targets: Any, binary: bool, ignore_index: int = 0) -> Any:
    """A loss on a device, in float32; targets of the host are checked and put there."""
    td = data(targets)
    if not backend.on_device(td):
        td = np.asarray(td, np.float32)
        if binary and ((td < 0) | (td > 1))[td != ignore_index].any():
            raise ValueError(f"[{op}] targets must be from 0 to 1, or {ignore_index} where they do not count.")
        td = backend.put(td, backend.device_of(xd))
    if td.dtype != np.float32:
        raise TypeError(f"[{op}] targets must be float32 on a device, got {td.dtype}.")
    check.shape(op, "targets", td, f"the shape of {'logits' if binary else 'x'}", xd.shape)
    xd, td, count = contiguous(xd), contiguous(td), backend.empty((1,), like=xd)
    y = kernels(xd).regression_forward(count, xd, td, binary, ignore_index)
    if not recording(x):
        return wrap(y, x)

    def backward(dy: Array) -> Sequence[Array]:
        dx = backend.empty_like(xd)
        kernels(xd).regression_backward(dx, dy, xd, td, count, binary, ignore_index)
        return (dx,)

    return record(y, (x,), backward)
