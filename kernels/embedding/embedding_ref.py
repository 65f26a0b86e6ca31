"""Embedding in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

CASES: list[dict[str, Any]] = [
    {"ids": (2, 5), "V": 11, "C": 48},
    {"ids": (), "V": 3, "C": 33},
    {"ids": (7,), "V": 1, "C": 1},
    {"ids": (0,), "V": 5, "C": 16},
    {"ids": (4, 100), "V": 7, "C": 31, "int64": True},
    {"ids": (300,), "V": 50, "C": 1023},
    {"ids": (40,), "V": 50, "C": 77, "bfloat16": True},
    {"ids": (3,), "V": 5, "C": 0},
    {"ids": (8, 1024), "V": 50257, "C": 768, "bench": True},
    {"ids": (8, 1024), "V": 50257, "C": 768, "bfloat16": True, "bench": True},
]
GRADIENTS = ("weight",)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    V, C = case["V"], case["C"]
    ids = rng.integers(0, V, case["ids"], np.int64 if case.get("int64") else np.int32)
    weight = rng.standard_normal((V, C), np.float32)
    return {"ids": np.asarray(ids), "weight": weight.astype(ml_dtypes.bfloat16) if case.get("bfloat16") else weight}


def forward(ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ids any shape, weight (V, C) -> (*ids.shape, C)."""
    rows = weight[ids]
    return rows if rows.dtype == np.float64 else rows.astype(np.float32)


def backward(dy: np.ndarray, ids: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """dy (*ids.shape, C) -> gradients by argument name."""
    dweight = np.zeros(weight.shape, dy.dtype)
    np.add.at(dweight, ids, dy)
    return {"weight": dweight}
