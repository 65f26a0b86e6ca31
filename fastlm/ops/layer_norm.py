"""Layer normalization. Ba et al. 2016, arXiv:1607.06450."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.ops import check
from fastlm.tensor import data, leaf, needs_grad, record, recording, wrap


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Any:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the last axis.

    x: (..., C) float32. weight, bias: (C,) float32, bias may be None. Returns (..., C) float32: a Tensor where an input is one.
    Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("layer_norm", "x", data(x), at_least=1)
    C = xd.shape[-1]
    wd = check.array("layer_norm", "weight", data(weight))
    check.shape("layer_norm", "weight", wd, "(C,)", (C,), f"x is {xd.shape}.")
    bd = None
    if bias is not None:
        bd = check.array("layer_norm", "bias", data(bias))
        check.shape("layer_norm", "bias", bd, "(C,)", (C,), f"x is {xd.shape}.")
    eps = check.number("layer_norm", "eps", eps, low=0.0)

    y = backend.empty(xd.shape)
    mean, rstd = backend.empty(xd.shape[:-1]), backend.empty(xd.shape[:-1])
    _C.layer_norm_forward(y, mean, rstd, xd, wd, bd, eps)
    if not recording(x, weight, bias):
        return wrap(y, x, weight, bias)

    def backward(dy: Array) -> Sequence[Array | None]:
        dx = backend.empty(xd.shape)
        dweight = _buffer(weight)
        dbias = _buffer(bias)
        pieces = -(-(xd.size // max(C, 1)) // _C.layer_norm_rows)
        partial = backend.empty((pieces, 2, C) if dweight is not None or dbias is not None else (0,))
        _C.layer_norm_backward(dx, dweight, dbias, partial, dy, xd, wd, mean, rstd)
        return dx, None if leaf(weight) else dweight, None if leaf(bias) else dbias

    return record(y, (x, weight, bias), backward)


def _buffer(parameter: Any) -> Array | None:
    """Where the kernel adds this parameter's gradient: its own buffer if it is a leaf, a fresh one if it was computed."""
    target = leaf(parameter)
    if target is not None:
        return target.grad_buffer()
    return backend.zeros(parameter.shape) if needs_grad(parameter) else None
