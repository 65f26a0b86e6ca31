"""Biases by distance in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

CASES: list[dict[str, Any]] = [
    {"B": 1, "H": 3, "T": 7, "S": 7, "N": 5, "P": 6, "center": 5},
    {"B": 1, "H": 4, "T": 33, "S": 33, "N": 8, "P": 41, "center": 20},
    {"B": 3, "H": 2, "T": 1, "S": 100, "N": 32, "P": 129, "center": 128},
    {"B": 2, "H": 5, "T": 31, "S": 64, "N": 6, "P": 9, "center": 4},
    {"B": 2, "H": 1, "T": 3, "S": 1023, "N": 1, "P": 1, "center": 0},
    {"B": 1, "H": 2, "T": 4, "S": 17, "N": 7, "P": 12, "center": 0, "bfloat16": True},
    {"B": 2, "H": 3, "T": 0, "S": 5, "N": 2, "P": 3, "center": 1},
    {"B": 2, "H": 3, "T": 4, "S": 0, "N": 2, "P": 3, "center": 1},
    {"B": 1, "H": 8, "T": 512, "S": 512, "N": 32, "P": 257, "center": 128, "bench": True},
    {"B": 8, "H": 12, "T": 1, "S": 1024, "N": 32, "P": 129, "center": 128, "bench": True},
]
GRADIENTS = ("weight",)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Some queries stand before all keys, some behind them."""
    B, H, T, S, N, P = (case[n] for n in "BHTSNP")
    weight = rng.standard_normal((N, H), np.float32)
    return {
        "buckets": rng.integers(0, N, P, np.int32),
        "weight": weight.astype(ml_dtypes.bfloat16) if case.get("bfloat16") else weight,
        "positions": rng.integers(-2, S + P, (B, T), np.int32),
        "keys": S,
        "center": case["center"],
    }


def _index(buckets: np.ndarray, positions: np.ndarray, keys: int, center: int) -> np.ndarray:
    """(B, T, S)."""
    distance = np.arange(keys) - positions[:, :, None].astype(np.int64)
    return buckets[np.clip(center + distance, 0, len(buckets) - 1)]


def forward(buckets: np.ndarray, weight: np.ndarray, positions: np.ndarray, keys: int, center: int) -> np.ndarray:
    """buckets (P,), weight (N, H), positions (B, T) -> (B, H, T, S)."""
    y = weight[_index(buckets, positions, keys, center)].transpose(0, 3, 1, 2)
    return y if y.dtype == np.float64 else y.astype(np.float32)


def backward(
    dy: np.ndarray, buckets: np.ndarray, weight: np.ndarray, positions: np.ndarray, keys: int, center: int
) -> dict[str, np.ndarray]:
    """dy (B, H, T, S) -> gradients by argument name."""
    dweight = np.zeros(weight.shape, dy.dtype)
    np.add.at(dweight, _index(buckets, positions, keys, center), dy.transpose(0, 2, 3, 1))
    return {"weight": dweight}
