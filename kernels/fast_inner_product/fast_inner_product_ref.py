"""A linear layer with a float32 weight in NumPy; and Winograd's inner product step by step, in the order of the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"rows": rows, "out": out, "in": K}
    for rows, out, K in (
        (1, 1, 1), (1, 31, 33), (2, 33, 16), (3, 5, 15), (4, 64, 1023), (5, 97, 40), (8, 8, 64), (9, 130, 257), (12, 7, 96), (13, 40, 96),
        (17, 26, 300), (33, 130, 1031), (40, 25, 2049), (70, 9, 48), (130, 70, 1024), (300, 45, 31),
    )
] + [
    {"rows": rows, "out": out, "in": K, "bench": True}
    for rows, out, K in ((1024, 768, 768), (1024, 3072, 768), (1024, 768, 3072), (1024, 384, 384), (64, 768, 768), (8, 768, 768))
]  # fmt: skip
GRADIENTS = ("x", "weight")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x = rng.standard_normal((case["rows"], case["in"]), np.float32)
    return {"x": x, "weight": np.float32(0.04) * rng.standard_normal((case["out"], case["in"]), np.float32)}


def forward(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (M, K), weight (N, K) -> x W^T (M, N)."""
    return x @ weight.T


def backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """dy (M, N) -> gradients by argument name."""
    return {"x": dy @ weight, "weight": dy.T @ x}


def pairs(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x W^T by the identity, five pairs of each 16 k, in float64: the algorithm without its rounding."""
    M, K = x.shape
    y = np.zeros((M, weight.shape[0]))
    for k in range(0, K - K % 16, 16):
        for i in range(0, 15, 3):
            x1, x2 = x[:, k + i].astype(np.float64), x[:, k + i + 1].astype(np.float64)
            w1, w2 = weight[:, k + i].astype(np.float64), weight[:, k + i + 1].astype(np.float64)
            y += (x1[:, None] + w2) * (x2[:, None] + w1) - (x1 * x2)[:, None] - w1 * w2
        alone = [k + 2, k + 5, k + 8, k + 11, k + 14, k + 15]
        y += x[:, alone].astype(np.float64) @ weight[:, alone].astype(np.float64).T
    rest = slice(K - K % 16, K)
    exact: np.ndarray = y + x[:, rest].astype(np.float64) @ weight[:, rest].astype(np.float64).T
    return exact
