"""A linear layer with bias, activation and residual in NumPy: the oracle in float64, and in float32 the naive peer."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

CASES: list[dict[str, Any]] = [
    {"x": (1, 1), "out": 1},
    {"x": (0, 5), "out": 7, "activation": "gelu"},
    {"x": (3, 0), "out": 4, "activation": "silu"},
    {"x": (3, 4), "out": 0},
    {"x": (31,), "out": 33, "residual": True},
    {"x": (2, 31), "out": 33, "activation": "gelu", "residual": True},
    {"x": (3, 65), "out": 31, "activation": "gelu_tanh"},
    {"x": (4, 1023), "out": 33, "activation": "silu", "bias": False},
    {"x": (1, 130), "out": 70, "activation": "relu", "residual": True},
    {"x": (2, 9, 48), "out": 40, "activation": "gelu", "residual": True},
    {"x": (3, 11, 64), "out": 96, "activation": "gelu_tanh"},
    {"x": (33, 1023), "out": 31, "activation": "silu", "large": True},
    {"x": (150, 70), "out": 257, "activation": "relu", "bias": False, "residual": True, "large": True},
    {"x": (130, 1030), "out": 200, "large": True},
    {"x": (70, 33), "out": 130, "activation": "relu", "bias": False, "residual": True},
    {"x": (1, 130), "out": 70, "weight": "bfloat16"},
    {"x": (2, 19, 77), "out": 33, "weight": "bfloat16", "activation": "gelu"},
    {"x": (1024, 768), "out": 2304, "bench": True},
    {"x": (1024, 768), "out": 3072, "activation": "gelu", "bench": True},
    {"x": (1024, 3072), "out": 768, "residual": True, "bench": True},
    {"x": (1024, 768), "out": 768, "residual": True, "bench": True},
    {"x": (64, 768), "out": 3072, "cold": "weight", "bench": True},
    {"x": (8, 768), "out": 3072, "cold": "weight", "bench": True},
    {"x": (1, 768), "out": 3072, "cold": "weight", "bench": True},
    {"x": (1, 768), "out": 3072, "bench": True},
    {"x": (1, 768), "out": 3072, "weight": "bfloat16", "cold": "weight", "bench": True},
    {"x": (8, 768), "out": 3072, "weight": "bfloat16", "cold": "weight", "bench": True},
    {"x": (512, 768), "out": 3072, "weight": "bfloat16", "bench": True},
    {"x": (1, 768), "out": 50257, "bias": False, "bench": True},
    {"x": (8, 768), "out": 50257, "bias": False, "bench": True},
    {"x": (1024, 768), "out": 50257, "bias": False, "bench": True},
    {"x": (768, 128), "out": 384, "bench": True},
]
GRADIENTS = ("x", "weight", "bias", "residual")

_erf = np.vectorize(math.erf, otypes=[float])


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape, out = case["x"], case["out"]
    weight: np.ndarray = rng.standard_normal((out, shape[-1]), np.float32) / np.float32(max(shape[-1], 1) ** 0.5)
    if case.get("weight") == "bfloat16":
        weight = weight.astype(ml_dtypes.bfloat16)
    return {
        "x": rng.standard_normal(shape, np.float32),
        "weight": weight,
        "bias": rng.standard_normal(out, np.float32) if case.get("bias", True) else None,
        "activation": case.get("activation"),
        "residual": rng.standard_normal((*shape[:-1], out), np.float32) if case.get("residual") else None,
    }


def activate(z: np.ndarray, kind: str | None) -> np.ndarray:
    """z (...) -> act(z)."""
    half, one = z.dtype.type(0.5), z.dtype.type(1)
    if kind == "gelu":
        return half * z * (one + _erf(z / z.dtype.type(math.sqrt(2))).astype(z.dtype))
    if kind == "gelu_tanh":
        return half * z * (one + np.tanh(z.dtype.type(math.sqrt(2 / math.pi)) * (z + z.dtype.type(0.044715) * z**3)))
    if kind == "silu":
        return z / (one + np.exp(-z))
    return np.maximum(z, 0) if kind == "relu" else z


def derivative(z: np.ndarray, kind: str | None) -> np.ndarray:
    """z (...) -> act'(z)."""
    half, one = z.dtype.type(0.5), z.dtype.type(1)
    if kind == "gelu":
        density = np.exp(-half * z * z) / z.dtype.type(math.sqrt(2 * math.pi))
        return half * (one + _erf(z / z.dtype.type(math.sqrt(2))).astype(z.dtype)) + z * density
    if kind == "gelu_tanh":
        c, d = z.dtype.type(math.sqrt(2 / math.pi)), z.dtype.type(0.044715)
        t = np.tanh(c * (z + d * z**3))
        return half * (one + t) + half * z * (one - t * t) * c * (one + 3 * d * z * z)
    if kind == "silu":
        s = one / (one + np.exp(-z))
        return s * (one + z * (one - s))
    return (z > 0).astype(z.dtype) if kind == "relu" else np.ones_like(z)


def _sums(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    z = x @ weight.astype(x.dtype).T
    return z if bias is None else z + bias


def forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """x (..., K), weight (N, K), bias (N,), residual (..., N) -> act(x W^T + b) + residual (..., N)."""
    y = activate(_sums(x, weight, bias), activation)
    return y if residual is None else y + residual


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str | None = None,
    residual: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """dy (..., N) -> gradients by argument name; a weight that is not float32 or float64 is frozen."""
    dz = dy * derivative(_sums(x, weight, bias), activation)
    (n, k), rows = weight.shape, math.prod(x.shape[:-1])
    grads = {"x": dz @ weight.astype(x.dtype)}
    if weight.dtype.kind == "f":
        grads["weight"] = dz.reshape(rows, n).T @ x.reshape(rows, k)
    if bias is not None:
        grads["bias"] = dz.reshape(rows, n).sum(axis=0)
    if residual is not None:
        grads["residual"] = dy
    return grads
