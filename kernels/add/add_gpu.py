"""Sums of arrays on the GPU, the host's side."""

from __future__ import annotations

from typing import Any


def add(gpu: Any, out: Any, x: Any, y: Any) -> None:
    """out = x + y; y has x's shape or that of its last axes; out has x's dtype and may be x."""
    n, period, blocks = x.size, max(y.size, 1), -(-x.size // 1024)
    if gpu.twin == "cuda":
        suffixes = ["bf16" if a.dtype.itemsize == 2 else "fp32" for a in (x, y)]
        gpu.cuda(f"add_{suffixes[0]}_{suffixes[1]}", (blocks,), 256, [out, x, y, n, period])
        return
    gpu.triton("add", (blocks,), {"out": out, "x": x, "y": y, "n": n, "period": period}, plain=("n", "period"), BLOCK=1024)
