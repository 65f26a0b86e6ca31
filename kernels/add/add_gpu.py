"""Sums of arrays on the GPU, the host's side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BLOCK = 1024
SERIAL = 64  # elements
ENOUGH = 1 << 15  # outputs, a thread each


def add(gpu: Any, out: Any, x: Any, y: Any) -> None:
    """out = x + y; y has x's shape or that of its last axes; out has x's dtype and may be x."""
    n, period, blocks = x.size, max(y.size, 1), -(-x.size // BLOCK)
    if gpu.twin == "cuda":
        suffixes = ["bf16" if a.dtype.itemsize == 2 else "fp32" for a in (x, y)]
        gpu.cuda(f"add_{suffixes[0]}_{suffixes[1]}", (blocks,), 256, [out, x, y, n, period])
        return
    gpu.triton("add", (blocks,), {"out": out, "x": x, "y": y, "n": n, "period": period}, plain=("n", "period"), BLOCK=BLOCK)


def scale_add(gpu: Any, y: Any, x: Any, a: float, add: bool) -> None:
    """y = a x, or y += a x; y may be x. x and y of one dtype, but for y = a x."""
    arguments = {"y": y, "x": x, "z": y if add else None, "n": x.size, "a": float(a)}
    gpu.triton("scale_add", (-(-x.size // BLOCK),), arguments, plain=("n",), BLOCK=BLOCK)


def tanh(gpu: Any, y: Any, x: Any) -> None:
    """y = tanh(x)."""
    gpu.triton("tanh", (-(-x.size // BLOCK),), {"y": y, "x": x, "n": x.size}, plain=("n",), BLOCK=BLOCK)


def tanh_backward(gpu: Any, dx: Any, dy: Any, y: Any) -> None:
    """dx = dy (1 - y^2); dx may be dy."""
    gpu.triton("tanh_backward", (-(-y.size // BLOCK),), {"dx": dx, "dy": dy, "y": y, "n": y.size}, plain=("n",), BLOCK=BLOCK)


def advance(gpu: Any, y: Any, x: Any, by: int) -> None:
    """y = x + by, int32 or int64; y may be x."""
    gpu.triton("advance", (-(-x.size // BLOCK),), {"y": y, "x": x, "n": x.size, "by": by}, plain=("n", "by"), BLOCK=BLOCK)


def add_broadcast(gpu: Any, out: Any, x: Any, y: Any) -> None:
    """out = x + y, repeated as NumPy does; float32, at most four axes, out contiguous, x and y with any strides."""
    shape = _four(out.shape)
    strides = {f"{n}{i}": s for n, a in (("x", x), ("y", y)) for i, s in enumerate(_strides(a, shape))}
    arguments = {"out": out, "x": x, "y": y, "n": out.size} | {f"D{i}": shape[i] for i in (1, 2, 3)} | strides
    plain = tuple(k for k in arguments if k not in ("out", "x", "y"))
    gpu.triton("add_broadcast", (-(-out.size // BLOCK),), arguments, plain=plain, BLOCK=BLOCK)


def sum_to(gpu: Any, out: Any, x: Any) -> None:
    """out = x summed over the axes along which out was repeated to x's shape; at most four axes, out contiguous.

    A thread sums at most SERIAL elements where there are too few outputs to fill a card: into pieces, which are summed in their order.
    """
    shape, kept, n = _four(x.shape), _four(out.shape), out.size
    strides = _strides(x, shape)
    summed = [n if k == 1 else 1 for n, k in zip(shape, kept, strict=True)]
    count = summed[0] * summed[1] * summed[2] * summed[3]
    pieces = 1 if count <= SERIAL or n >= ENOUGH else -(-count // SERIAL)
    to = out if pieces == 1 else gpu.empty((pieces, n))
    arguments = {"out": to, "x": x, "n": n, "pieces": pieces} | {f"K{i}": kept[i] for i in (1, 2, 3)}
    arguments |= {f"k{i}": 0 if kept[i] == 1 else strides[i] for i in range(4)} | {"count": count}
    arguments |= {f"R{i}": summed[i] for i in (1, 2, 3)} | {f"r{i}": strides[i] for i in range(4)}
    plain = tuple(k for k in arguments if k not in ("out", "x"))
    gpu.triton("sum_to", (-(-n * pieces // 256),), arguments, plain=plain, BLOCK=256)
    if pieces > 1:
        sum_to(gpu, out.reshape(n), to)


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) > 4:
        raise ValueError(f"[add] at most four axes are broadcast on the GPU, got {tuple(shape)}.")
    return (*(1,) * (4 - len(shape)), *shape)


def _strides(x: Any, shape: Sequence[int]) -> list[int]:
    """Strides of x in elements along the axes of `shape`, 0 where it is repeated."""
    own, size = _four(x.shape), x.dtype.itemsize
    steps = (*(0,) * (4 - len(x.shape)), *(s // size for s in x.strides))
    return [0 if n == 1 else s for n, s in zip(own, steps, strict=True)]
