"""RMS normalization, alone and fused with a residual addition. Zhang & Sennrich 2019, arXiv:1910.07467."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import Spare, accumulator, data, record, record_many, recording, remade, wrap


def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x: (..., C) float32. weight: (C,) float32. Returns (..., C) float32: a Tensor where an input is one.
    Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("rms_norm", "x", data(x), at_least=1)
    wd = check.weight("rms_norm", "weight", data(weight), xd)
    eps = check.number("rms_norm", "eps", eps, low=0.0)
    y = backend.empty_like(xd)
    if not recording(x, weight):
        kernels(xd).rms_norm_forward(y, None, None, xd, None, wd, eps)
        return wrap(y, x, weight)
    rstd = backend.empty(xd.shape[:-1], like=xd)
    kernels(xd).rms_norm_forward(y, None, rstd, xd, None, wd, eps)

    def again() -> Array:
        y = backend.empty_like(xd)
        kernels(xd).rms_norm_forward(y, None, None, xd, None, wd, eps)
        return y

    def backward(dy: Array, spare: Spare) -> Sequence[Array | None]:
        return _backward(dy, spare.onto, xd, weight, wd, rstd, spare.dy if spare.onto is None else spare.onto)

    return record(y, (x, weight), backward, reuses=True, remade=remade(y, again))


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6) -> tuple[Any, Any]:
    """(rms_norm(x + residual, weight, eps), x + residual): the sum is written once and never read again.

    x, residual: (..., C) float32. weight: (C,) float32. Returns two (..., C) float32: Tensors where an input is one.
    Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("add_rms_norm", "x", data(x), at_least=1)
    rd = check.array("add_rms_norm", "residual", data(residual))
    check.shape("add_rms_norm", "residual", rd, "the shape of x", xd.shape)
    wd = check.weight("add_rms_norm", "weight", data(weight), xd)
    eps = check.number("add_rms_norm", "eps", eps, low=0.0)
    y, total = backend.empty_like(xd), backend.empty_like(xd)
    if not recording(x, residual, weight):
        kernels(xd).rms_norm_forward(y, total, None, xd, rd, wd, eps)
        return wrap(y, x, residual, weight), wrap(total, x, residual, weight)
    rstd = backend.empty(xd.shape[:-1], like=xd)
    kernels(xd).rms_norm_forward(y, total, rstd, xd, rd, wd, eps)

    def backward(dy: Array | None, dtotal: Array | None) -> Sequence[Array | None]:
        if dy is None:
            return dtotal, dtotal, None
        dx, dweight = _backward(dy, dtotal, total, weight, wd, rstd)
        return dx, dx, dweight

    normed, summed = record_many((y, total), (x, residual, weight), backward)
    return normed, summed


def _backward(
    dy: Array, dtotal: Array | None, xd: Array, weight: Any, wd: Array, rstd: Array, into: Array | None = None
) -> tuple[Array, Array | None]:
    """`into`: where the gradient of x is written; dy or dtotal may be the place."""
    dx = backend.empty_like(xd) if into is None else into
    target, dweight = accumulator(weight)
    partial = None
    if target is not None and isinstance(xd, np.ndarray):  # a device has its own
        partial = backend.empty((-(-rstd.size // _C.rms_norm_rows), xd.shape[-1]))
    dtotal = None if dtotal is None else contiguous(dtotal)
    kernels(xd).rms_norm_backward(dx, target, partial, contiguous(dy), dtotal, xd, wd, rstd)
    return dx, dweight
