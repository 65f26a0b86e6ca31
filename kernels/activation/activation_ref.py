"""Activation functions in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

KINDS = ("gelu", "gelu_tanh", "silu", "relu")
CASES: list[dict[str, Any]] = [
    *({"shape": shape, "kind": kind} for kind in KINDS for shape in ((3, 5, 33), (1,), (0, 7), (1023,))),
    *({"shape": (4099,), "kind": kind, "size": 8.0} for kind in KINDS),
    *({"shape": (2048, 3072), "kind": kind, "bench": True} for kind in KINDS),
]
GRADIENTS = ("x",)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x = rng.standard_normal(case["shape"], np.float32) * np.float32(case.get("size", 2.0))
    return {"x": x, "kind": case["kind"]}


def _erf(x: np.ndarray) -> np.ndarray:
    """NumPy has none: math.erf in float64, rounded to the dtype."""
    return np.array([math.erf(v) for v in x.ravel().tolist()]).reshape(x.shape).astype(x.dtype)


def act(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """act(x) and its derivative."""
    f = x.dtype.type
    if kind == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    if kind == "silu":
        s = 1 / (1 + np.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    if kind == "gelu_tanh":
        t = np.tanh(f(math.sqrt(2 / math.pi)) * (x + f(0.044715) * x**3))
        slope = f(math.sqrt(2 / math.pi)) * (1 + f(3 * 0.044715) * x**2)
        return f(0.5) * x * (1 + t), f(0.5) * (1 + t) + f(0.5) * x * (1 - t * t) * slope
    phi = f(0.5) * (1 + _erf(x / f(math.sqrt(2))))
    return x * phi, phi + x * np.exp(f(-0.5) * x * x) / f(math.sqrt(2 * math.pi))


def forward(x: np.ndarray, kind: str) -> np.ndarray:
    """x -> act(x), the same shape."""
    return act(x, kind)[0]


def backward(dy: np.ndarray, x: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """dy -> gradients by argument name."""
    return {"x": dy * act(x, kind)[1]}
