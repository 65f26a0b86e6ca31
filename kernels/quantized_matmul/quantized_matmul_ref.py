"""A linear layer with a quantised weight in NumPy: dequantise, then multiply."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fastlm.checkpoint.quantized import QuantizedArray

_dequantize = importlib.import_module("fastlm.kernels.dequantize.dequantize_ref")
KINDS: tuple[str, ...] = tuple(_dequantize.BLOCKS)

CASES: list[dict[str, Any]] = [
    {"kind": kind, "rows": rows, "out": out, "in": count * _dequantize.BLOCKS[kind][0]}
    | ({"large": True} if out * count * _dequantize.BLOCKS[kind][0] > 64 * 1024 else {})  # (33, 40, 2) takes the same branches
    for kind in KINDS
    for rows, out, count in (
        (1, 1, 1),
        (0, 5, 1),
        (2, 31, 3),
        (3, 33, 1),
        (4, 64, 5),
        (15, 70, 2),
        (33, 40, 2),
        (33, 130, 7),
        (5, 0, 1),
    )
] + [
    {"kind": kind, "rows": rows, "out": out, "in": 4096, "bench": True}
    for kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
    for rows, out in ((1, 4096), (8, 4096), (512, 4096))
]
GRADIENTS = ("x",)


def random_weight(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> QuantizedArray:
    """Random codes and sub-scales; the halves are of the size that real weights have."""
    values, size = _dequantize.BLOCKS[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // values, size), np.uint8)
    halves = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(kind, (0, 2))
    for at in halves:
        half = (0.05 * rng.standard_normal(blocks.shape[:2])).astype("<f2")
        blocks[:, :, at : at + 2] = half[..., None].view(np.uint8)
    return QuantizedArray(kind, shape, blocks.reshape(shape[0], shape[1] // values * size))


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x = rng.standard_normal((case["rows"], case["in"]), np.float32)
    return {"x": x, "weight": random_weight(case["kind"], (case["out"], case["in"]), rng)}


def dequantized(weight: QuantizedArray) -> np.ndarray:
    """(out, in) float32, by the oracle of `dequantize`."""
    w: np.ndarray = _dequantize.forward(weight.kind, weight.shape, weight.blocks)
    return w


def forward(x: np.ndarray, weight: QuantizedArray) -> np.ndarray:
    """x (M, K), weight (N, K) -> x W^T (M, N)."""
    return x @ dequantized(weight).astype(x.dtype).T


def backward(dy: np.ndarray, x: np.ndarray, weight: QuantizedArray) -> dict[str, np.ndarray]:
    """dy (M, N) -> gradient of x; the weight is frozen."""
    return {"x": dy @ dequantized(weight).astype(dy.dtype)}
