"""Layer normalization in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (2, 3, 48)},
    {"shape": (5, 1)},
    {"shape": (7, 31), "bias": False},
    {"shape": (7, 33)},
    {"shape": (1, 1023)},
    {"shape": (0, 16)},
    {"shape": (65, 768), "offset": 100.0},
    {"shape": (8192, 768), "bench": True},
    {"shape": (1024, 4096), "bench": True},
]
GRADIENTS = ("x", "weight", "bias")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape = case["shape"]
    x = rng.standard_normal(shape, np.float32) + np.float32(case.get("offset", 0.0))
    weight = rng.standard_normal(shape[-1], np.float32)
    bias = rng.standard_normal(shape[-1], np.float32) if case.get("bias", True) else None
    return {"x": x, "weight": weight, "bias": bias, "eps": 1e-5}


def forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, eps: float = 1e-5) -> np.ndarray:
    """x (..., C) -> y (..., C)."""
    mean = x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(np.square(x - mean).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    y = (x - mean) * rstd * weight
    return y if bias is None else y + bias


def backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, eps: float = 1e-5
) -> dict[str, np.ndarray]:
    """dy (..., C) -> gradients by argument name."""
    mean = x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(np.square(x - mean).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    n = (x - mean) * rstd
    g = dy * weight
    dx = rstd * (g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    grads = {"x": dx, "weight": (dy * n).sum(axis=rows)}
    if bias is not None:
        grads["bias"] = dy.sum(axis=rows)
    return grads
