"""The operations between the kernels: reshape, split, add, scale.

They are NumPy on purpose. A reshape or a split moves no data, so a kernel has nothing to do; the sums and products that cost
time are fused into the kernels around them (`linear` adds bias and residual, `add_layer_norm` adds before it normalises).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.ops import check
from fastlm.tensor import data, needs_grad, record, recording, wrap


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
    return record(y, (x,), lambda dy: (dy.reshape(xd.shape),))


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

    # `whole` stands between x and the parts. The first part that the backward pass reaches makes the array that is its gradient;
    # the others write into it. Parts that had no gradient are zeros.
    buffer: list[Array] = []
    written: set[int] = set()

    def whole_backward(dy: Array) -> Sequence[Array]:
        for i, span in enumerate(spans):
            if i not in written:
                dy[..., span] = 0
        buffer.clear()
        return (dy,)

    whole = record(xd, (x,), whole_backward)

    def part_backward(i: int) -> Callable[[Array], Sequence[Array | None]]:
        def backward(dy: Array) -> Sequence[Array | None]:
            first = not buffer
            if first:
                buffer.append(backend.empty(xd.shape))
            buffer[0][..., spans[i]] = dy
            written.add(i)
            return (buffer[0] if first else None,)

        return backward

    return tuple(record(part, (whole,), part_backward(i)) for i, part in enumerate(parts))


def add(x: Any, y: Any) -> Any:
    """x + y. x: (..., *S) float32; y: the same shape, or S, the last axes of x, for which it is repeated. Returns the shape of x.

    Raises TypeError for a dtype, ValueError for any other shape.
    """
    xd = check.any_array("add", "x", data(x), np.float32)
    yd = check.any_array("add", "y", data(y), np.float32)
    if yd.shape != xd.shape[xd.ndim - min(yd.ndim, xd.ndim) :]:
        raise ValueError(f"[add] y must have the shape of x, {xd.shape}, or that of its last axes, got {yd.shape}.")
    out = np.add(xd, yd, out=backend.empty(xd.shape))
    if not recording(x, y):
        return wrap(out, x, y)

    def backward(dy: Array) -> Sequence[Array | None]:
        dyd: Array | None = None
        if needs_grad(y):
            dyd = dy if yd.shape == xd.shape else dy.reshape(-1, *yd.shape).sum(0)
        return dy if needs_grad(x) else None, dyd

    return record(out, (x, y), backward)


def scale(x: Any, factor: float) -> Any:
    """x * factor. x: any shape, float32; factor: a number, not differentiated. Raises TypeError for anything else."""
    xd = check.any_array("scale", "x", data(x), np.float32)
    factor32 = np.float32(check.number("scale", "factor", factor))
    y = np.multiply(xd, factor32, out=backend.empty(xd.shape))
    if not recording(x):
        return wrap(y, x)
    return record(y, (x,), lambda dy: (np.multiply(dy, factor32, out=backend.empty(xd.shape)),))
