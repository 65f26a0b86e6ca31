"""RMS normalization in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (2, 3, 48)},
    {"shape": (5, 1)},
    {"shape": (7, 31)},
    {"shape": (7, 33), "residual": True},
    {"shape": (1, 1023)},
    {"shape": (0, 16)},
    {"shape": (3, 0)},
    {"shape": (65, 576), "residual": True},
    {"shape": (33, 257), "size": 1e-3},
    {"shape": (4096, 2048), "bench": True},
    {"shape": (1024, 4096), "bench": True},
    {"shape": (8192, 768), "bench": True},
    {"shape": (8192, 768), "residual": True, "bench": True},
    {"shape": (1, 2048), "bench": True},
]
GRADIENTS = ("x", "residual", "weight")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape = case["shape"]
    named: dict[str, Any] = {"x": rng.standard_normal(shape, np.float32) * np.float32(case.get("size", 1.0))}
    if case.get("residual"):
        named["residual"] = rng.standard_normal(shape, np.float32)
    return named | {"weight": rng.standard_normal(shape[-1], np.float32), "eps": 1e-6}


def forward(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6, residual: np.ndarray | None = None) -> Any:
    """x (..., C) -> y (..., C); with residual (..., C) -> y, x + residual."""
    total = x if residual is None else x + residual
    rstd = 1 / np.sqrt(np.square(total).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    y = total * rstd * weight
    return y if residual is None else (y, total)


def backward(
    dy: Any, x: np.ndarray, weight: np.ndarray, eps: float = 1e-6, residual: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """dy (..., C), or two of them with residual -> gradients by argument name."""
    total, dtotal = x, None
    if residual is not None:
        total, (dy, dtotal) = x + residual, dy
    rstd = 1 / np.sqrt(np.square(total).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    n = total * rstd
    g = dy * weight
    dx = rstd * (g - n * (g * n).mean(axis=-1, keepdims=True))
    grads = {"weight": (dy * n).sum(axis=tuple(range(x.ndim - 1)))}
    if residual is None:
        return grads | {"x": dx}
    return grads | {"x": dx + dtotal, "residual": dx + dtotal}
