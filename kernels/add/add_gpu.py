"""Sums of arrays on the GPU, the host's side."""

from __future__ import annotations

from typing import Any


def add(gpu: Any, out: Any, x: Any, y: Any) -> None:
    """out = x + y; y has x's shape or that of its last axes. out may be x."""
    arguments = {"out": out, "x": x, "y": y, "n": x.size, "period": max(y.size, 1)}
    gpu.triton("add", (-(-x.size // 1024),), arguments, plain=("n", "period"), BLOCK=1024)
