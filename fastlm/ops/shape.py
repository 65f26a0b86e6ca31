"""The operations between the kernels: reshape, split, add, add_broadcast, scale.

A reshape or a split moves no data. The sums and products that cost time are fused into the kernels around them (`linear` adds bias
and residual, `add_layer_norm` adds before it normalises); those that are left are a kernel where nothing is repeated, so that a
recorded step has them, and NumPy's elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.cuda.array import DeviceArray
from fastlm.ops import check
from fastlm.tensor import data, needs_grad, record, record_many, recording, wrap


def reshape(x: Any, shape: Sequence[int]) -> Any:
    """x with another shape of as many elements; one size may be -1. A view wherever NumPy can give one, else a copy.

    x: any shape and dtype. Returns an array, or a Tensor where x is one. Raises ValueError where the sizes do not multiply out.
    """
    xd = check.any_array("reshape", "x", data(x))
    shape = tuple(shape)
    try:
        y = xd.reshape(shape)
    except ValueError:
        raise ValueError(f"[reshape] shape must have as many elements as x, {xd.size} in {xd.shape}, got {shape}.") from None
    if not recording(x):
        return wrap(y, x)
    before = xd.shape  # the rules refer to shapes, so that arrays may go
    return record(y, (x,), lambda dy: (dy.reshape(before),))


def split(x: Any, sizes: Sequence[int]) -> tuple[Any, ...]:
    """x cut along its last axis into strided views of the given sizes: (..., sum(sizes)) -> (..., size) each. Nothing is copied.

    Raises ValueError where the sizes do not add up to the last axis. The backward pass writes the parts' gradients into one array.
    """
    xd = check.any_array("split", "x", data(x), at_least=1)
    sizes = tuple(int(size) for size in sizes)
    if min(sizes, default=-1) < 0 or sum(sizes) != xd.shape[-1]:
        raise ValueError(f"[split] sizes must add up to the last axis of x, {xd.shape[-1]} in {xd.shape}, got {sizes}.")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    parts = [xd[..., span] for span in spans]
    if not recording(x):
        return tuple(wrap(part, x) for part in parts)

    whole = xd.shape
    return record_many(parts, (x,), lambda *dys: (_joined(dys, spans, whole),))


def _joined(dys: Sequence[Array | None], spans: Sequence[slice], shape: tuple[int, ...]) -> Array:
    """The parts' gradients in one array: the one that they are views of (see `gradients_like`), else a new one; zeros for None."""
    given = next(dy for dy in dys if dy is not None)
    base = getattr(dys[0], "base", None)
    if isinstance(base, np.ndarray) and base.shape == shape and base.flags.c_contiguous:
        views = [base[..., span] for span in spans]
        if all(dy is not None and _same_place(dy, view) for dy, view in zip(dys, views, strict=True)):
            return base
    if not isinstance(given, np.ndarray):
        there: Array = _joined_there(dys, spans, shape, given)
        return there
    joined = backend.empty(shape)
    for dy, span in zip(dys, spans, strict=True):
        joined[..., span] = 0 if dy is None else dy
    return joined


def _joined_there(dys: Sequence[Any], spans: Sequence[slice], shape: tuple[int, ...], given: Any) -> Any:
    """On a device: the parts' whole where they are pieces of one, else copies."""
    whole = DeviceArray(given.device, shape, given.dtype, given.pointer, given.owner)
    if spans[0].start == 0 and all(
        dy is not None and dy.owner is given.owner and (dy.pointer, dy.strides) == (view.pointer, view.strides)
        for dy, view in zip(dys, [whole[..., span] for span in spans], strict=True)
    ):
        return whole
    joined = backend.empty_like(given, shape) if all(dy is not None for dy in dys) else given.device.zeros(shape, given.dtype)
    for dy, span in zip(dys, spans, strict=True):
        if dy is not None:
            backend.assign(joined[..., span], dy)
    return joined


def _same_place(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.__array_interface__["data"] == b.__array_interface__["data"]


def gradients_like(*parts: Array) -> tuple[Array, ...]:
    """Uninitialised arrays for the gradients of `parts`, of the same shapes and dtypes.

    Where the parts are what `split` made of one array, in that order and all of them, these are views of one new array, which the
    backward pass of `split` then passes on as it is. Otherwise they are separate C-contiguous arrays.
    """
    width, element = sum(part.shape[-1] for part in parts), parts[0].itemsize
    address = _address(parts[0])
    for part in parts:
        lead = part.shape[:-1]
        expected, size = [], element * width
        for n in reversed(lead):
            expected.append(size)
            size *= n
        if (
            lead != parts[0].shape[:-1]
            or part.strides != (*reversed(expected), element)
            or part.dtype != parts[0].dtype
            or _address(part) != address
        ):
            return tuple(backend.empty_like(p) for p in parts)
        address += element * part.shape[-1]
    whole = backend.empty_like(parts[0], (*parts[0].shape[:-1], width))
    ends = [sum(part.shape[-1] for part in parts[: i + 1]) for i in range(len(parts))]
    return tuple(whole[..., end - part.shape[-1] : end] for part, end in zip(parts, ends, strict=True))


def _address(x: Any) -> int:
    return int(x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.pointer)


def add(x: Any, y: Any) -> Any:
    """x + y. x: (..., *S) float32; y: the same shape, or S, the last axes of x, for which it is repeated. Returns the shape of x.

    Raises TypeError for a dtype, ValueError for any other shape.
    """
    xd = check.any_array("add", "x", data(x), np.float32)
    yd = check.any_array("add", "y", data(y), np.float32)
    check.together("add", "x", xd, y=yd)
    if yd.shape != xd.shape[xd.ndim - min(yd.ndim, xd.ndim) :]:
        raise ValueError(f"[add] y must have the shape of x, {xd.shape}, or that of its last axes, got {yd.shape}.")
    out = backend.empty_like(xd)
    if not isinstance(xd, np.ndarray):
        kernels(xd).add(out, contiguous(xd), contiguous(yd))
    elif xd.shape == yd.shape and xd.flags.c_contiguous and yd.flags.c_contiguous:
        _C.add(out, yd, xd)
    elif (repeats := _repeats(xd, yd)) is not None:
        for part, of_x in zip(out.reshape(-1, *yd.shape), repeats, strict=True):
            _C.add(part, yd, of_x)
    else:
        np.add(xd, yd, out=out)
    if not recording(x, y):
        return wrap(out, x, y)

    want_x, want_y, repeated, shape = needs_grad(x), needs_grad(y), yd.shape != xd.shape, yd.shape

    def backward(dy: Array) -> Sequence[Array | None]:
        dyd = (_repeats_summed(dy, shape) if repeated else dy) if want_y else None
        return dy if want_x else None, dyd

    return record(out, (x, y), backward)


def _by_kernels(n: int, size: int) -> bool:
    """Whether n launches on `size` numbers each are better than NumPy: few and long they take less time, and a recording has them."""
    return n > 0 and size > 0 and (backend.recording() or (n <= 64 and size >= 1024))


def _repeats(xd: Array, yd: Array) -> Array | None:
    """x as (n, *y.shape) where kernels are to add each of these and y; else None."""
    n = xd.size // max(yd.size, 1)
    plain = xd.flags.c_contiguous and yd.flags.c_contiguous
    return xd.reshape(n, *yd.shape) if plain and _by_kernels(n, yd.size) else None


def _repeats_summed(dy: Array, shape: tuple[int, ...]) -> Array:
    """dy summed over the axes before the last ones, which are `shape`."""
    rows = dy.reshape(-1, *shape)
    if not isinstance(rows, np.ndarray):
        return backend.sum_to(rows, (1, *shape)).reshape(shape)
    if rows.flags.c_contiguous and _by_kernels(len(rows), rows[:1].size):
        summed = backend.copy(rows[0])
        for row in rows[1:]:
            _C.scale_add(summed, row, 1.0, True)
        return summed
    total: Array = rows.sum(0)
    return total


def add_broadcast(x: Any, y: Any) -> Any:
    """x + y by NumPy's rules of broadcasting: a bias (1, H, T, S) and one (B, 1, T, S). float32; sums of -inf are allowed.

    Returns an array, or a Tensor where an input is one. Raises TypeError for a dtype, ValueError for shapes that do not broadcast.
    """
    xd = check.any_array("add_broadcast", "x", data(x), np.float32)
    yd = check.any_array("add_broadcast", "y", data(y), np.float32)
    check.together("add_broadcast", "x", xd, y=yd)
    try:
        if isinstance(xd, np.ndarray):
            out = np.add(xd, yd)
        else:
            out = backend.empty_like(xd, np.broadcast_shapes(xd.shape, yd.shape))
            kernels(xd).add_broadcast(out, xd, yd)
    except ValueError:
        raise ValueError(f"[add_broadcast] y must broadcast with x, {xd.shape}, got {yd.shape}.") from None
    if not recording(x, y):
        return wrap(out, x, y)

    of_x, of_y = xd.shape if needs_grad(x) else None, yd.shape if needs_grad(y) else None

    def backward(dy: Array) -> Sequence[Array | None]:
        return None if of_x is None else _summed_to(dy, of_x), None if of_y is None else _summed_to(dy, of_y)

    return record(out, (x, y), backward)


def _summed_to(dy: Array, shape: tuple[int, ...]) -> Array:
    """dy summed over the axes along which `shape` was repeated."""
    if dy.shape == shape:
        return dy
    if not isinstance(dy, np.ndarray):
        return backend.sum_to(contiguous(dy), shape)
    lead = dy.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1 and dy.shape[lead + i] != 1)
    total: Array = dy.sum(axis=axes, keepdims=False).reshape(shape)
    return total


def scale(x: Any, factor: float) -> Any:
    """x * factor. x: any shape, float32; factor: a number, not differentiated. Raises TypeError for anything else."""
    xd = check.any_array("scale", "x", data(x), np.float32)
    factor32 = np.float32(check.number("scale", "factor", factor))
    y = backend.empty_like(xd)
    if not isinstance(xd, np.ndarray) or xd.flags.c_contiguous:
        kernels(xd).scale_add(y, contiguous(xd), factor32, False)
    else:
        np.multiply(xd, factor32, out=y)
    if not recording(x):
        return wrap(y, x)

    def backward(dy: Array) -> Sequence[Array | None]:
        dx = backend.empty_like(dy)
        if isinstance(dx, np.ndarray):
            np.multiply(dy, factor32, out=dx)
        else:
            kernels(dx).scale_add(dx, contiguous(dy), factor32, False)
        return (dx,)

    return record(y, (x,), backward)
