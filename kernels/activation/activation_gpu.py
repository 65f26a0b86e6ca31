"""Activation functions on the GPU, the host's side: the functions of csrc/bind/activation.cpp."""

from __future__ import annotations

from typing import Any

BLOCK = 1024  # elements of a program


def activation_forward(gpu: Any, y: Any, x: Any, kind: int) -> None:
    blocks, tail = _blocks(x)
    arguments = {"y": y, "x": x, "tail": tail, "kind": kind}
    gpu.triton("activation_forward", (blocks,), arguments, plain=("tail", "kind"), BLOCK=BLOCK)


def activation_backward(gpu: Any, dx: Any, dy: Any, x: Any, kind: int) -> None:
    blocks, tail = _blocks(x)
    arguments = {"dx": dx, "dy": dy, "x": x, "tail": tail, "kind": kind}
    gpu.triton("activation_backward", (blocks,), arguments, plain=("tail", "kind"), BLOCK=BLOCK)


def _blocks(x: Any) -> tuple[int, int]:
    """How many programs, and how many elements the last one has: so the number of elements need not fit into an int32."""
    blocks = -(-x.size // BLOCK)
    return blocks, x.size - (blocks - 1) * BLOCK
