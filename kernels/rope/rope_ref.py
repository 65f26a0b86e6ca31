"""Rotary position embedding in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

# shape: B, T, H, D; rotary: R. positions: none, "row" (T,) or "all" (B, T).
CASES: list[dict[str, Any]] = [
    {"shape": (2, 5, 3, 8), "rotary": 8},
    {"shape": (2, 5, 3, 8), "rotary": 8, "interleaved": True},
    {"shape": (1, 7, 2, 33), "rotary": 22, "positions": "row"},
    {"shape": (3, 4, 1, 31), "rotary": 30, "positions": "all", "interleaved": True},
    {"shape": (2, 9, 4, 64), "rotary": 64, "positions": "all"},
    {"shape": (2, 1, 5, 80), "rotary": 2, "positions": "all"},
    {"shape": (1, 3, 2, 96), "rotary": 70, "interleaved": True},
    {"shape": (1, 300, 6, 128), "rotary": 128},
    {"shape": (2, 0, 3, 8), "rotary": 4},
    {"shape": (1, 3, 2, 5), "rotary": 0},
    {"shape": (4, 512, 12, 64), "rotary": 64, "bench": True},
    {"shape": (1, 2048, 32, 128), "rotary": 128, "bench": True},
    {"shape": (1, 1, 32, 128), "rotary": 128, "bench": True},
]
GRADIENTS = ("x",)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, T, _, _ = case["shape"]
    half, P = case["rotary"] // 2, T + 9
    angles = rng.random((P, half)) * 6.28
    positions = {"row": (T,), "all": (B, T)}.get(case.get("positions", ""))
    return {
        "x": rng.standard_normal(case["shape"], np.float32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "positions": None if positions is None else rng.integers(0, P, positions).astype(np.int32),
        "interleaved": case.get("interleaved", False),
    }


def forward(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray | None = None, interleaved: bool = False
) -> np.ndarray:
    """x (B, T, H, D) -> (B, T, H, D)."""
    at = np.arange(x.shape[1]) if positions is None else positions
    c, s = cos[at][..., :, None, :], sin[at][..., :, None, :]
    half = cos.shape[1]
    y = x.copy()
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = x[..., first], x[..., second]
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


def backward(
    dy: np.ndarray, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray | None = None, interleaved: bool = False
) -> dict[str, np.ndarray]:
    """dy (B, T, H, D) -> gradients by argument name: the rotation's transpose is its inverse."""
    return {"x": forward(dy, cos, -sin, positions, interleaved)}
