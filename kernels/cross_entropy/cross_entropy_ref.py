"""Softmax cross-entropy in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (2, 3, 48)},
    {"shape": (5, 1)},
    {"shape": (7, 31), "reduction": "sum"},
    {"shape": (7, 33), "reduction": "none", "ignored": 3},
    {"shape": (4, 1023), "ignored": 1, "scale": 30.0},
    {"shape": (3, 1025), "masked": True},
    {"shape": (3, 4099), "reduction": "none", "offset": 500.0},
    {"shape": (0, 16), "reduction": "sum"},
    {"shape": (6, 17), "ignored": 6},
    {"shape": (1, 70001)},  # longer than what a block of the GPU keeps
    {"shape": (90, 50257), "ignored": 2, "reduction": "sum", "large": True},  # for streamed stores, rows at odd addresses
    {"shape": (1024, 50257), "bench": True},
    {"shape": (8192, 1024), "bench": True},
]
GRADIENTS = ("logits",)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    shape = case["shape"]
    logits = rng.standard_normal(shape, np.float32) * np.float32(case.get("scale", 3.0)) + np.float32(case.get("offset", 0.0))
    targets = rng.integers(0, shape[-1], shape[:-1])
    targets.reshape(-1)[: case.get("ignored", 0)] = -100
    if case.get("masked"):
        hidden = rng.random(shape) < 0.3
        np.put_along_axis(hidden, targets[..., None], False, axis=-1)
        logits[hidden] = -np.inf
    return {"logits": logits, "targets": targets, "reduction": case.get("reduction", "mean")}


def _reduce(loss: np.ndarray, valid: np.ndarray, reduction: str) -> np.ndarray:
    if reduction == "none":
        return loss
    total = loss.sum()
    return np.asarray(total if reduction == "sum" else total / max(int(valid.sum()), 1), loss.dtype)


def forward(logits: np.ndarray, targets: np.ndarray, ignore_index: int = -100, reduction: str = "mean") -> np.ndarray:
    """logits (..., V), targets (...) -> loss, () or (...)."""
    valid = targets != ignore_index
    picked = np.take_along_axis(logits, np.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
    most = logits.max(axis=-1)
    loss = np.log(np.exp(logits - most[..., None]).sum(axis=-1)) - (picked - most)
    return _reduce(np.where(valid, loss, loss.dtype.type(0)), valid, reduction)


def backward(
    dy: np.ndarray, logits: np.ndarray, targets: np.ndarray, ignore_index: int = -100, reduction: str = "mean"
) -> dict[str, np.ndarray]:
    """dy, () or (...), -> gradients by argument name."""
    valid = targets != ignore_index
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    onehot = np.arange(logits.shape[-1]) == targets[..., None]
    scale = dy / max(int(valid.sum()), 1) if reduction == "mean" else dy
    dlogits = (p - onehot) * np.broadcast_to(scale, targets.shape)[..., None] * valid[..., None]
    return {"logits": dlogits.astype(logits.dtype)}
