"""Layer normalization, alone and fused with a residual addition. Ba et al. 2016, arXiv:1607.06450."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import Spare, accumulator, data, record, record_many, recording, remade, wrap


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Any:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the last axis.

    x: (..., C) float32. weight, bias: (C,) float32, bias may be None. Returns (..., C) float32: a Tensor where an input is one.
    Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("layer_norm", "x", data(x), at_least=1)
    wd = check.weight("layer_norm", "weight", data(weight), xd)
    bd = None if bias is None else check.weight("layer_norm", "bias", data(bias), xd)
    eps = check.number("layer_norm", "eps", eps, low=0.0)
    y = backend.empty_like(xd)
    if not recording(x, weight, bias):
        kernels(xd).layer_norm_forward(y, None, None, xd, None, wd, bd, eps)
        return wrap(y, x, weight, bias)
    stats = backend.empty((*xd.shape[:-1], 3), like=xd)
    kernels(xd).layer_norm_forward(y, None, stats, xd, None, wd, bd, eps)

    def again() -> Array:
        y = backend.empty_like(xd)
        kernels(xd).layer_norm_forward(y, None, None, xd, None, wd, bd, eps)
        return y

    def backward(dy: Array, spare: Spare) -> Sequence[Array | None]:
        return _backward(dy, spare.onto, xd, weight, bias, wd, stats, spare.dy if spare.onto is None else spare.onto)

    return record(y, (x, weight, bias), backward, reuses=True, remade=remade(y, again))


def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> tuple[Any, Any]:
    """(layer_norm(x + residual, weight, bias, eps), x + residual): the sum is written once and never read again.

    x, residual: (..., C) float32. weight, bias: (C,) float32, bias may be None. Returns two (..., C) float32: Tensors where an input
    is one. Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("add_layer_norm", "x", data(x), at_least=1)
    rd = check.array("add_layer_norm", "residual", data(residual))
    check.shape("add_layer_norm", "residual", rd, "the shape of x", xd.shape)
    wd = check.weight("add_layer_norm", "weight", data(weight), xd)
    bd = None if bias is None else check.weight("add_layer_norm", "bias", data(bias), xd)
    eps = check.number("add_layer_norm", "eps", eps, low=0.0)
    y, total = backend.empty_like(xd), backend.empty_like(xd)
    if not recording(x, residual, weight, bias):
        kernels(xd).layer_norm_forward(y, total, None, xd, rd, wd, bd, eps)
        return wrap(y, x, residual, weight, bias), wrap(total, x, residual, weight, bias)
    stats = backend.empty((*xd.shape[:-1], 3), like=xd)
    kernels(xd).layer_norm_forward(y, total, stats, xd, rd, wd, bd, eps)

    def backward(dy: Array | None, dtotal: Array | None) -> Sequence[Array | None]:
        if dy is None:
            return dtotal, dtotal, None, None
        dx, dweight, dbias = _backward(dy, dtotal, total, weight, bias, wd, stats)
        return dx, dx, dweight, dbias

    normed, summed = record_many((y, total), (x, residual, weight, bias), backward)
    return normed, summed


def _backward(
    dy: Array, dtotal: Array | None, xd: Array, weight: Any, bias: Any, wd: Array, stats: Array, into: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """`into`: where the gradient of x is written; dy or dtotal may be the place."""
    dx = backend.empty_like(xd) if into is None else into
    weight_target, dweight = accumulator(weight)
    bias_target, dbias = accumulator(bias)
    partial = None
    if isinstance(xd, np.ndarray) and (weight_target is not None or bias_target is not None):  # a device has its own
        partial = backend.empty((-(-stats.size // 3 // _C.layer_norm_rows), 2, xd.shape[-1]))
    dtotal = None if dtotal is None else contiguous(dtotal)
    kernels(xd).layer_norm_backward(dx, weight_target, bias_target, partial, contiguous(dy), dtotal, xd, wd, stats)
    return dx, dweight, dbias
