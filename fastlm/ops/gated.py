"""Gated activation. Shazeer 2020, GLU variants improve transformer, arXiv:2002.05202."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.ops.activation import KINDS
from fastlm.ops.shape import gradients_like
from fastlm.tensor import data, needs_grad, record, recording, remade, wrap


def gated(gate: Any, up: Any, kind: str) -> Any:
    """act(gate) * up, elementwise. kind as in `activation`: "silu" gives SwiGLU, "gelu" GeGLU.

    gate, up: (..., F) float32, the same shape; each may be a view along the last axis of a wider array, as `split` gives: it is not
    copied. Returns (..., F) float32: a Tensor where an input is one. Raises TypeError for a dtype, ValueError for a shape or kind.
    """
    gd = _rows(check.any_array("gated", "gate", data(gate), np.float32, at_least=1))
    ud = _rows(check.any_array("gated", "up", data(up), np.float32))
    if gd.shape != ud.shape:
        check.shape("gated", "up", ud, "the shape of gate", gd.shape)
    number = check.choice("gated", "kind", kind, KINDS)
    y = backend.empty_like(gd)
    kernels(gd).gated_forward(y, gd, ud, number)
    if not recording(gate, up):
        return wrap(y, gate, up)

    want_gate, want_up = needs_grad(gate), needs_grad(up)

    def again() -> Array:
        y = backend.empty_like(gd)
        kernels(gd).gated_forward(y, gd, ud, number)
        return y

    def backward(dy: Array) -> Sequence[Array | None]:
        dgate, dup = gradients_like(gd, ud)
        kernels(gd).gated_backward(dgate, dup, contiguous(dy), gd, ud, number)
        return dgate if want_gate else None, dup if want_up else None

    return record(y, (gate, up), backward, remade=remade(y, again))


def _rows(x: Array) -> Array:
    """x itself if its rows are contiguous and evenly spaced, else a contiguous copy."""
    if x.flags.c_contiguous if isinstance(x, np.ndarray) else x.contiguous:
        return x
    size = x.dtype.itemsize
    if x.strides[-1] == size and x.ndim >= 2 and x.strides[-2] % size == 0 and x.strides[-2] > 0:
        step = x.strides[-2] * x.shape[-2]
        for n, stride in zip(x.shape[-3::-1], x.strides[-3::-1], strict=True):
            if stride != step:
                return contiguous(x)
            step *= n
        return x
    return contiguous(x)
