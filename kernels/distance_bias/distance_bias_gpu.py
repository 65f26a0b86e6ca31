"""Biases by distance on the GPU, the host's side: the functions of csrc/bind/distance_bias.cpp, launching the Triton twin."""

from __future__ import annotations

from typing import Any

BLOCK = 1024


def distance_bias_forward(gpu: Any, y: Any, buckets: Any, weight: Any, positions: Any, center: int) -> None:
    """positions (T,) with B = 1, or (B, T)."""
    _, H, T, S = y.shape
    named = {"y": y, "buckets": buckets, "weight": weight, "positions": positions, "n": y.size, "H": H, "T": T, "S": S}
    named |= {"P": buckets.size, "center": center}
    plain = ("n", "H", "T", "S", "P", "center")
    gpu.triton("distance_bias_forward", (-(-y.size // BLOCK),), named, plain=plain, BLOCK=BLOCK)


def distance_bias_backward(gpu: Any, dweight: Any, dy: Any, buckets: Any, positions: Any, center: int) -> None:
    """One program for each number of the table goes through the head's scores, in their order."""
    B, H, T, S = dy.shape
    N = dweight.shape[0]
    named = {"dweight": dweight, "dy": dy, "buckets": buckets, "positions": positions, "rows": B * T, "H": H, "T": T, "S": S}
    named |= {"P": buckets.size, "center": center}
    plain = ("rows", "H", "T", "S", "P", "center")
    gpu.triton("distance_bias_backward", (N, H), named, plain=plain, BLOCK=BLOCK)
