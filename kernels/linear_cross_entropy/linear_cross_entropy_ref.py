"""Linear layer and cross-entropy in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

CASES: list[dict[str, Any]] = [
    {"x": (2, 3, 16), "V": 48},
    {"x": (5, 1), "V": 1},
    {"x": (0, 8), "V": 5},
    {"x": (7, 31), "V": 33, "reduction": "sum", "ignored": 3},
    {"x": (6, 17), "V": 9, "ignored": 6},
    {"x": (150, 33), "V": 4099, "large": True},  # three chunks, the last one short
    {"x": (3, 200, 24), "V": 2049, "ignored": 371, "large": True},
    {"x": (9, 64), "V": 65, "weight": "bfloat16"},
    {"x": (1024, 768), "V": 50257, "bench": True},
    {"x": (768, 128), "V": 65, "bench": True},
]
GRADIENTS = ("x", "weight")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape, V = case["x"], case["V"]
    weight: np.ndarray = rng.standard_normal((V, shape[-1]), np.float32) * np.float32(3 / shape[-1] ** 0.5)
    targets = rng.integers(0, V, shape[:-1])
    targets.reshape(-1)[rng.permutation(targets.size)[: case.get("ignored", 0)]] = -100
    return {
        "x": rng.standard_normal(shape, np.float32),
        "weight": weight.astype(ml_dtypes.bfloat16) if case.get("weight") == "bfloat16" else weight,
        "targets": targets,
        "reduction": case.get("reduction", "mean"),
    }


def _terms(x: np.ndarray, weight: np.ndarray, targets: np.ndarray, ignore_index: int, reduction: str) -> tuple[Any, ...]:
    logits = x @ weight.astype(x.dtype).T
    valid = targets != ignore_index
    p = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    total = p.sum(axis=-1, keepdims=True)
    picked = np.take_along_axis(logits, np.where(valid, targets, 0)[..., None], axis=-1)
    loss = (np.log(total) - (picked - logits.max(axis=-1, keepdims=True, initial=-np.inf)))[..., 0]
    return loss, p / total, valid, x.dtype.type(max(int(valid.sum()), 1) if reduction == "mean" else 1)


def forward(
    x: np.ndarray, weight: np.ndarray, targets: np.ndarray, ignore_index: int = -100, reduction: str = "mean"
) -> np.ndarray:
    """x (..., C), weight (V, C), targets (...) -> loss, ()."""
    loss, _, valid, count = _terms(x, weight, targets, ignore_index, reduction)
    return np.asarray(np.where(valid, loss, 0).sum() / count, x.dtype)


def dlogits(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, targets: np.ndarray, ignore_index: int = -100, reduction: str = "mean"
) -> np.ndarray:
    """dy, (), -> (..., V)."""
    _, p, valid, count = _terms(x, weight, targets, ignore_index, reduction)
    onehot = np.arange(weight.shape[0]) == targets[..., None]
    return ((p - onehot) * valid[..., None] * (dy / count)).astype(x.dtype)


def backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, targets: np.ndarray, ignore_index: int = -100, reduction: str = "mean"
) -> dict[str, np.ndarray]:
    """dy, (), -> gradients by argument name; bfloat16 weights have none."""
    d = dlogits(dy, x, weight, targets, ignore_index, reduction)
    grads = {"x": d @ weight.astype(x.dtype)}
    if weight.dtype.kind == "f":
        grads["weight"] = d.reshape(-1, weight.shape[0]).T @ x.reshape(-1, x.shape[-1])
    return grads
