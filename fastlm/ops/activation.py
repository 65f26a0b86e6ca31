"""Activation functions. GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415; SiLU: section 2 there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.ops import check
from fastlm.tensor import Spare, data, record, recording, remade, wrap

KINDS: dict[str, int] = _C.activation_kinds


def activation(x: Any, kind: str) -> Any:
    """act(x), elementwise.

    kind: "gelu", x Phi(x) with the normal distribution function Phi (by erf); "gelu_tanh", its tanh approximation, that of GPT-2;
    "silu", x / (1 + e^-x); "relu". x: any shape, float32. Returns the same shape, float32: a Tensor where x is one. The gradient
    keeps nothing but x. Raises TypeError for a dtype, ValueError for an unknown kind.
    """
    xd = check.array("activation", "x", data(x))
    number = check.choice("activation", "kind", kind, KINDS)
    y = backend.empty_like(xd)
    kernels(xd).activation_forward(y, xd, number)
    if not recording(x):
        return wrap(y, x)

    def again() -> Array:
        y = backend.empty_like(xd)
        kernels(xd).activation_forward(y, xd, number)
        return y

    def backward(dy: Array, spare: Spare) -> Sequence[Array]:
        dx = backend.empty_like(xd) if spare.dy is None else spare.dy
        kernels(xd).activation_backward(dx, contiguous(dy), xd, number)
        return (dx if spare.onto is None else backend.add(dx, spare.onto, out=dx),)

    return record(y, (x,), backward, reuses=True, remade=remade(y, again))


def tanh(x: Any) -> Any:
    """tanh(x), elementwise, by NumPy: a pooler's, over one row a sequence. float32 of any shape; a Tensor where x is one."""
    xd = check.any_array("tanh", "x", data(x), np.float32)
    y = backend.empty_like(xd)
    if isinstance(xd, np.ndarray):
        np.tanh(xd, out=y)
    else:
        backend.kernels(xd).tanh(y, backend.contiguous(xd))
    if not recording(x):
        return wrap(y, x)

    def backward(dy: Array) -> Sequence[Array]:
        if isinstance(y, np.ndarray):
            return (dy * (1 - y * y),)
        dx = backend.empty_like(y)
        backend.kernels(y).tanh_backward(dx, backend.contiguous(dy), y)
        return (dx,)

    return record(y, (x,), backward)
