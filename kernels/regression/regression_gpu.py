"""Mean squared error and binary cross-entropy on the GPU, the host's side."""

from __future__ import annotations

from typing import Any


def regression_forward(gpu: Any, count: Any, x: Any, targets: Any, binary: bool, ignore_index: int = 0) -> Any:
    """The mean loss, (); count (1,) = how many numbers it is the mean of, at least 1."""
    pieces = -(-x.size // 1024)
    partial, total = gpu.empty((pieces, 2)), gpu.empty(())
    arguments = {"partial": partial, "x": x, "targets": targets, "n": x.size}
    arguments |= {"ignored": float(ignore_index), "binary": int(binary)}
    gpu.triton("regression_forward", (pieces,), arguments, plain=("n", "binary"), BLOCK=1024)
    arguments = {"total": total, "count": count, "partial": partial, "pieces": pieces}
    gpu.triton("regression_total", (1,), arguments, plain=("pieces",), BLOCK=1024)
    return total


def regression_backward(gpu: Any, dx: Any, dy: Any, x: Any, targets: Any, count: Any, binary: bool, ignore_index: int = 0) -> None:
    arguments = {"dx": dx, "dy": dy, "x": x, "targets": targets, "count": count, "n": x.size}
    arguments |= {"ignored": float(ignore_index), "binary": int(binary)}
    gpu.triton("regression_backward", (-(-x.size // 1024),), arguments, plain=("n", "binary"), BLOCK=1024)
