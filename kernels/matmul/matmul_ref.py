"""Matrix product in NumPy: the oracle in float64, and in float32 the naive peer."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"a": (1, 1), "b": (1, 1)},
    {"a": (0, 5), "b": (5, 7)},
    {"a": (3, 0), "b": (0, 4)},
    {"a": (3, 4), "b": (4, 0)},
    {"a": (1, 31), "b": (31, 33)},
    {"a": (33, 1), "b": (1, 31)},
    {"a": (31, 1023), "b": (1023, 33)},
    {"a": (15, 513), "b": (513, 1)},
    {"a": (2, 3, 17), "b": (17, 40)},
    {"a": (2, 3, 29, 17), "b": (2, 3, 17, 35)},
    {"a": (5, 1, 64), "b": (5, 64, 31)},
    {"a": (2, 130, 70), "b": (2, 70, 257), "large": True},
    {"a": (2, 130, 33), "b": (2, 33, 70)},
    {"a": (520, 3), "b": (3, 70)},
    {"a": (0, 3, 4), "b": (0, 4, 5)},
    {"a": (150, 1030), "b": (1030, 200), "large": True},
    {"a": (512, 512), "b": (512, 512), "bench": True},
    {"a": (1024, 1024), "b": (1024, 1024), "bench": True},
    {"a": (2048, 2048), "b": (2048, 2048), "bench": True},
    {"a": (1024, 768), "b": (768, 2304), "bench": True},
    {"a": (96, 256, 64), "b": (96, 64, 256), "bench": True},
    {"a": (48, 16, 64), "b": (48, 64, 16), "bench": True},
    {"a": (8, 768), "b": (768, 3072), "cold": "b", "bench": True},
    {"a": (64, 768), "b": (768, 3072), "cold": "b", "bench": True},
]
GRADIENTS = ("a", "b")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {"a": rng.standard_normal(case["a"], np.float32), "b": rng.standard_normal(case["b"], np.float32)}


def forward(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (..., M, K), b (K, N) or (..., K, N) -> (..., M, N)."""
    return np.matmul(a, b)


def backward(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """dy (..., M, N) -> gradients by argument name."""
    db = np.matmul(np.swapaxes(a, -1, -2), dy)
    if b.ndim == 2 and a.ndim > 2:
        db = db.reshape(-1, *b.shape).sum(axis=0)
    return {"a": np.matmul(dy, np.swapaxes(b, -1, -2)), "b": db}


def bound(a: np.ndarray, b: np.ndarray, constant: float = 2.0) -> np.ndarray:
    """What the rounding of a chain of K multiply-adds may cost each element of a @ b: constant * eps * |row of a| * |column of b|.

    With u = eps / 2 each step rounds a partial sum s_k by at most u |s_k|, in effect at random (Higham and Mary 2019, "A new approach
    to probabilistic rounding error analysis"). For terms of random sign |s_k| is about sqrt(k / K) |row| |column| / sqrt(K), which
    sums in quadrature to u |row| |column| / sqrt(2): constant 2 is six standard deviations.
    """
    rows = np.sqrt(np.square(a.astype(np.float64)).sum(axis=-1))[..., :, None]
    columns = np.sqrt(np.square(b.astype(np.float64)).sum(axis=-2))[..., None, :]
    return constant * float(np.finfo(np.float32).eps) * rows * columns
