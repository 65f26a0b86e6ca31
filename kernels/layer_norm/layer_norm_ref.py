"""Layer normalization in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (2, 3, 48)},
    {"shape": (5, 1)},
    {"shape": (7, 31), "bias": False},
    {"shape": (7, 33), "residual": True},
    {"shape": (1, 1023)},
    {"shape": (0, 16)},
    {"shape": (3, 0)},
    {"shape": (65, 768), "offset": 100.0},
    {"shape": (33, 257), "offset": 1000.0, "residual": True, "bias": False},
    {"shape": (8192, 768), "bench": True},
    {"shape": (8192, 768), "residual": True, "bench": True},
    {"shape": (1024, 4096), "bench": True},
    {"shape": (1, 768), "bench": True},
]
GRADIENTS = ("x", "residual", "weight", "bias")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape = case["shape"]
    named: dict[str, Any] = {"x": rng.standard_normal(shape, np.float32) + np.float32(case.get("offset", 0.0))}
    if case.get("residual"):
        named["residual"] = rng.standard_normal(shape, np.float32)
    weight = rng.standard_normal(shape[-1], np.float32)
    bias = rng.standard_normal(shape[-1], np.float32) if case.get("bias", True) else None
    return named | {"weight": weight, "bias": bias, "eps": 1e-5}


def forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, eps: float = 1e-5, residual: np.ndarray | None = None
) -> Any:
    """x (..., C) -> y (..., C); with residual (..., C) -> y, x + residual."""
    total = x if residual is None else x + residual
    mean = total.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(np.square(total - mean).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    y = (total - mean) * rstd * weight
    if bias is not None:
        y = y + bias
    return y if residual is None else (y, total)


def backward(
    dy: Any,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
    residual: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """dy (..., C), or two of them with residual -> gradients by argument name."""
    total, dtotal = x, None
    if residual is not None:
        total, (dy, dtotal) = x + residual, dy
    mean = total.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(np.square(total - mean).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    n = (total - mean) * rstd
    g = dy * weight
    dx = rstd * (g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    grads = {"weight": (dy * n).sum(axis=rows)}
    if bias is not None:
        grads["bias"] = dy.sum(axis=rows)
    if residual is None:
        return grads | {"x": dx}
    return grads | {"x": dx + dtotal, "residual": dx + dtotal}
