"""AdamW in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance. Here nothing is in place."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (3, 5)},
    {"shape": (1,), "step": 1},
    {"shape": (31,), "step": 1000},
    {"shape": (33,), "weight_decay": 0.0},
    {"shape": (1023,), "scale": 0.25},
    {"shape": (0,)},
    {"shape": (70001,), "step": 7},  # more than two pieces
    {"shape": (124_439_808,), "bench": True},
]
GRADIENTS = ()  # it is not differentiated


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape = case["shape"]
    return {
        "parameter": rng.standard_normal(shape, np.float32),
        "gradient": rng.standard_normal(shape, np.float32) * np.float32(0.1),
        "m": rng.standard_normal(shape, np.float32) * np.float32(0.01),
        "v": np.square(rng.standard_normal(shape, np.float32)) * np.float32(0.01),
        "step": case.get("step", 3),
        "lr": 6e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": case.get("weight_decay", 0.1),
        "scale": case.get("scale", 1.0),
    }


def forward(
    parameter: np.ndarray,
    gradient: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The new parameter, m and v."""
    g = gradient * scale
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    denominator = np.sqrt(v) / np.sqrt(1 - beta2**step) + eps
    parameter = parameter * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m / denominator
    return parameter.astype(gradient.dtype), m.astype(gradient.dtype), v.astype(gradient.dtype)


def backward(dy: Any, **_: Any) -> dict[str, np.ndarray]:
    """An update has no gradient."""
    return {}
