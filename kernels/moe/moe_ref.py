"""A mixture of experts in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"R": 13, "E": 4, "C": 24, "F": 40, "k": 2, "renormalise": True},
    {"R": 37, "E": 5, "C": 33, "F": 31, "k": 1},
    {"R": 20, "E": 8, "C": 17, "F": 19, "k": 3, "renormalise": True, "residual": True},
    {"R": 40, "E": 3, "C": 16, "F": 20, "k": 2, "renormalise": True, "capacity": 9},
    {"R": 30, "E": 4, "C": 12, "F": 9, "k": 1, "capacity": 2, "groups": 3, "residual": True},
    {"R": 1, "E": 33, "C": 5, "F": 7, "k": 2},
    {"R": 9, "E": 1, "C": 5, "F": 7, "k": 1, "renormalise": True},
    {"R": 6, "E": 4, "C": 1, "F": 1, "k": 4},
    {"R": 0, "E": 4, "C": 6, "F": 5, "k": 2},
    {"R": 150, "E": 2, "C": 130, "F": 140, "k": 1, "large": True},
    {"R": 2048, "E": 8, "C": 512, "F": 1792, "k": 2, "renormalise": True, "bench": True},
    {"R": 2048, "E": 64, "C": 512, "F": 1024, "k": 2, "renormalise": True, "bench": True},
    {"R": 1, "E": 8, "C": 1024, "F": 3584, "k": 2, "renormalise": True, "bench": True},
]
GRADIENTS = ("x", "logits", "up", "down", "residual")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    R, E, C, F = (case[n] for n in "RECF")
    named: dict[str, Any] = {
        "x": rng.standard_normal((R, C), np.float32),
        "logits": rng.standard_normal((R, E), np.float32),
        "up": rng.standard_normal((E, F, C), np.float32),
        "down": rng.standard_normal((E, C, F), np.float32),
    }
    if case.get("residual"):
        named["residual"] = rng.standard_normal((R, C), np.float32)
    return named | {"k": case["k"]} | {n: case[n] for n in ("renormalise", "capacity", "groups") if n in case}


def chosen(logits: np.ndarray, k: int, renormalise: bool, capacity: int | None, groups: int) -> Any:
    """probabilities (R, E), experts (R, k), weights (R, k), kept (R, k)."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    experts = np.argsort(-p, axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(p, experts, axis=1)
    if renormalise:
        weights = weights / weights.sum(axis=1, keepdims=True)
    kept = np.ones(experts.shape, bool)
    if capacity is not None:
        size = len(logits) // groups
        for g in range(groups):
            used = np.zeros(logits.shape[1], int)
            for j in range(k):
                for r in range(g * size, (g + 1) * size):
                    kept[r, j] = used[experts[r, j]] < capacity
                    used[experts[r, j]] += 1
    return p, experts, weights, kept


def forward(
    x: np.ndarray,
    logits: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    k: int,
    renormalise: bool = False,
    capacity: int | None = None,
    groups: int = 1,
    residual: np.ndarray | None = None,
) -> Any:
    """x (R, C) -> sum over the row's experts of weight * relu(x up^T) down^T, + residual."""
    _, experts, weights, kept = chosen(logits, k, renormalise, capacity, groups)
    y = np.zeros_like(x)
    for e in range(len(up)):  # a row comes to an expert once at most
        r, j = np.nonzero(kept & (experts == e))
        y[r] += weights[r, j, None] * (np.maximum(x[r] @ up[e].T, 0) @ down[e].T)
    return y if residual is None else y + residual


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    logits: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    k: int,
    renormalise: bool = False,
    capacity: int | None = None,
    groups: int = 1,
    residual: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """dy (R, C) -> gradients by argument name."""
    p, experts, weights, kept = chosen(logits, k, renormalise, capacity, groups)
    d = {"x": np.zeros_like(x), "up": np.zeros_like(up), "down": np.zeros_like(down)}
    dweights = np.zeros_like(weights)
    for r, j in np.argwhere(kept):
        e = experts[r, j]
        z = x[r] @ up[e].T
        h = np.maximum(z, 0)
        dweights[r, j] = dy[r] @ (h @ down[e].T)
        do = weights[r, j] * dy[r]
        d["down"][e] += np.outer(do, h)
        dz = (do @ down[e]) * (z > 0)
        d["up"][e] += np.outer(dz, x[r])
        d["x"][r] += dz @ up[e]
    dp = np.zeros_like(p)
    if renormalise:
        total = np.take_along_axis(p, experts, axis=1).sum(axis=1, keepdims=True)
        dweights = (dweights - (dweights * weights).sum(axis=1, keepdims=True)) / total
    np.put_along_axis(dp, experts, dweights, axis=1)
    d["logits"] = p * (dp - (dp * p).sum(axis=1, keepdims=True))
    return d if residual is None else d | {"residual": dy}
