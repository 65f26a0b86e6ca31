"""Linear layers with everything that follows in the same pass: bias, activation, residual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import BFLOAT16, Array, contiguous, kernels, on_device
from fastlm.checkpoint.mapping import release
from fastlm.checkpoint.quantized import FORMATS, LOSSLESS, ROW, QuantizedArray, expand
from fastlm.ops import check
from fastlm.ops.matmul import STORAGE, product
from fastlm.tensor import Spare, accumulator, data, keep, leaf, needs_grad, record, recording, remade, wrap

ACTIVATIONS: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


def linear(x: Any, weight: Any, bias: Any = None, activation: str | None = None, residual: Any = None, fast: bool = False) -> Any:
    """act(x W^T + b) + residual.

    x: (..., K) float32. weight: (N, K) float32, bfloat16, float16 or a QuantizedArray; all but float32 are frozen: they
    get no gradient.
    bias: (N,) float32. activation: None, "gelu" (erf), "gelu_tanh", "silu", "relu". residual: (..., N) float32.
    On a device x, bias and residual may be bfloat16, then weight too; bfloat16 weights are trained there, with float32 gradients.
    A QuantizedArray lies there as it is in the file.
    fast: float32 weights, and others that stand for float32, are multiplied by Winograd's inner product where this CPU gains
    (kernels/fast_inner_product): about as exact, with other bits than without. For layers that whole sequences go through, since one
    row alone does not gain.
    Returns (..., N) float32: a Tensor where an input is one. Raises TypeError for a dtype, ValueError for a shape.
    """
    xd = check.array("linear", "x", data(x), at_least=1)
    K = xd.shape[-1]
    wd = _weight(data(weight))
    if len(wd.shape) != 2 or wd.shape[1] != K:
        raise ValueError(f"[linear] weight must be (out, in) with in = {K}, got {tuple(wd.shape)}. x is {xd.shape}.")
    N = int(wd.shape[0])
    bd = rd = None
    if bias is not None:
        bd = check.array("linear", "bias", data(bias))
        check.shape("linear", "bias", bd, "(out,)", (N,), f"weight is {tuple(wd.shape)}.")
    shape = (*xd.shape[:-1], N)
    if residual is not None:
        rd = check.array("linear", "residual", data(residual))
        check.shape("linear", "residual", rd, "(..., out)", shape, f"x is {xd.shape}, weight is {tuple(wd.shape)}.")
    kind = ACTIVATIONS.get(activation, -1)
    if kind < 0:
        names = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"[linear] activation must be one of {names}, got {activation!r}.")

    M = math.prod(shape[:-1])
    y = backend.empty_like(xd, shape)
    recorded = recording(x, weight, bias, residual)
    z = backend.empty_like(y) if recorded and kind else None
    if fast and (plain := fast_weight(xd, wd)) is not None:
        _C.fast_inner_product(y, z, xd, plain, bd, rd, kind)
    elif isinstance(wd, QuantizedArray):
        multiply(y, z, xd, wd, bd, rd, M, kind)
    elif M == 1 and not recorded and wd.dtype == np.float32 and (wt := backend.turned([wd])) is not None:
        _C.matmul(y, z, xd, wt, bd, rd, 1, M, N, K, 0, 0, False, False, 0, False, kind)
    else:
        kernels(xd).matmul(y, z, xd, wd, bd, rd, 1, M, N, K, 0, 0, False, True, STORAGE[wd.dtype], False, kind)
    if not recorded:
        return wrap(y, x, weight, bias, residual)

    kept, want_x, want_residual = keep(x, xd), needs_grad(x), needs_grad(residual)
    want_weight = needs_grad(weight) and not isinstance(wd, QuantizedArray) and (wd.dtype == np.float32 or on_device(wd))
    shape_x = xd.shape

    def backward(dy: Array, spare: Spare) -> Sequence[Array | None]:
        nonlocal z
        dy = contiguous(dy)
        dz = dy
        if kind:
            dz = spare.dy if spare.dy is not None and not want_residual else backend.empty_like(dy)
        bias_target, dbias = accumulator(bias)
        if kind or bias_target is not None:
            partial = backend.empty((-(-M // _C.linear_rows), N), like=dy) if bias_target is not None else None
            kernels(dy).linear_backward(dz if kind else None, bias_target, partial, dy.reshape(M, N), z, kind)
            z = None  # the products below need its memory: whoever read the output has had it
        dx = dw = None
        if want_weight:
            owner = leaf(weight)
            target, add = owner.grad_target() if owner is not None else (backend.empty((N, K), like=dy), False)
            product(target, dz, kept(), N, K, M, a_transposed=True, accumulate=add)
            dw = None if owner is not None else target
        if want_x:
            dx = backend.empty_like(dy, shape_x) if spare.onto is None else spare.onto
            back = _dequantized(wd, dz) if isinstance(wd, QuantizedArray) else wd
            product(dx, dz, back, M, K, N, accumulate=spare.onto is not None)
        return dx, dw, dbias, dy if want_residual else None

    # The activation's output is computed again from z, not kept for the next layer.
    again = remade(y, lambda: _activated(z, kind)) if z is not None and not want_residual else None
    return record(y, (x, weight, bias, residual), backward, reuses=True, remade=again)


def fast_weight(x: Array, weight: Any) -> Array | None:
    """The weight in float32 where x W^T can be had by the fast inner product, else None."""
    if not (_C.has_fast_inner_product() and isinstance(x, np.ndarray) and x.size and math.prod(weight.shape)):
        return None
    if isinstance(weight, QuantizedArray):  # so that it has the bits of its plain copy
        exact = weight.kind != ROW and weight.activations == "float32" and (weight.kind != LOSSLESS or weight.value_bytes == 4)
        return weight.dequantize() if exact else None
    return weight if isinstance(weight, np.ndarray) and weight.dtype == np.float32 else None


def _activated(z: Array, kind: int) -> Array:
    y = backend.empty_like(z)
    kernels(z).linear_activation(y, z, kind)
    return y


def multiply(y: Array, z: Array | None, x: Array, weight: QuantizedArray, bias: Any, residual: Any, M: int, kind: int) -> None:
    """y (M, N) = act(x W^T + b) + residual by the kernel for the weight's kind and activations; all is checked."""
    N, K = weight.shape
    if backend.device_of(weight) is not backend.device_of(x):
        raise TypeError("[linear] weight must be on the device that x is on.")
    if on_device(x):
        if weight.kind == ROW:
            kernels(x).int8_rows(y, z, x, weight.blocks, weight.columns, bias, residual, M, N, K, kind)
            return
        rounds = weight.activations == "int8"
        there = kernels(x).int8_matmul if rounds else kernels(x).quantized_matmul
        there(y, z, x, weight.blocks, bias, residual, M, N, K, FORMATS[weight.kind][0], kind)
        return
    if weight.activations == "int16":
        _C.int16_matmul(y, z, x, packed(weight), bias, residual, M, N, K, FORMATS[weight.kind][0], kind)
        return
    if weight.kind == ROW:
        _C.int8_rows(y, z, x, packed(weight), weight.columns, bias, residual, M, N, K, kind)
        return
    if weight.kind == LOSSLESS:
        _C.lossless_matmul(y, z, x, weight.blocks, bias, residual, M, N, K, weight.value_bytes, kind)
        return
    kernel = _C.int8_matmul if weight.activations == "int8" else _C.quantized_matmul
    kernel(y, z, x, packed(weight), bias, residual, M, N, K, FORMATS[weight.kind][0], kind)


def _dequantized(weight: QuantizedArray, like: Array) -> Array:
    """The weight where `like` is, on a device in its dtype."""
    if isinstance(like, np.ndarray):
        return weight.dequantize()
    w = backend.empty_like(like, weight.shape)
    expand(w, weight)
    return w


def packed(weight: QuantizedArray) -> Array:
    """The weight as the kernel reads it, sixteen rows side by side; made once and kept on the weight. Its blocks are not read again."""
    kept: Array | None = weight.cache.get("packed")
    if kept is None:
        N, K = weight.shape
        if weight.kind == ROW:
            kept = backend.lasting(_C.int8_rows_packed_bytes(N, K))
            _C.int8_rows_pack(kept, weight.blocks, N, K)
        else:
            kind = FORMATS[weight.kind][0]
            kept = backend.lasting(_C.quantized_packed_bytes(N, K, kind))
            _C.quantized_pack(kept, weight.blocks, N, K, kind)
        weight.cache["packed"] = kept
        release(weight.blocks)  # those of a mapped file need not stay in memory
    return kept


def _weight(w: Any) -> Any:
    if isinstance(w, QuantizedArray):
        if w.kind == ROW and w.shape[-1] > _C.int8_rows_depth:
            raise ValueError(f"[linear] rows of a {ROW} weight must be at most {_C.int8_rows_depth} long, got {w.shape[-1]}.")
        return w
    if on_device(w):
        if w.dtype not in (np.float32, BFLOAT16):
            raise TypeError(f"[linear] weight must be float32 or bfloat16 on a device, got {w.dtype}.")
        return contiguous(w)
    if not isinstance(w, np.ndarray):
        raise TypeError(f"[linear] weight must be a NumPy array, a Tensor or a QuantizedArray, got {type(w).__name__}.")
    if w.dtype not in STORAGE:
        raise TypeError(
            f"[linear] weight must be float32, bfloat16 or float16, got {w.dtype}. Convert it with weight.astype('float32')."
        )
    return w if w.flags.c_contiguous else np.ascontiguousarray(w)
