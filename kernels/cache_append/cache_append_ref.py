"""Appending to a cache in NumPy, and what a cache in bfloat16 or int8 makes of its numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

# shape: B, T, capacity, G, D. starts: positions (B,), else (B, T). v_dim: E where it is not D. page: positions of a page.
CASES: list[dict[str, Any]] = [
    {"shape": (2, 1, 9, 2, 8), "starts": True},
    {"shape": (3, 5, 33, 2, 31), "starts": True},
    {"shape": (2, 7, 20, 3, 33)},
    {"shape": (1, 40, 40, 1, 16), "v_dim": 5},
    {"shape": (2, 1, 1, 1, 1)},
    {"shape": (2, 0, 5, 2, 8), "starts": True},
    {"shape": (0, 2, 5, 2, 8)},
    {"shape": (1, 300, 1023, 4, 64), "starts": True},
    {"shape": (2, 3, 192, 2, 8), "starts": True, "page": 64},
    {"shape": (3, 70, 256, 1, 31), "page": 128, "v_dim": 5},
    {"shape": (8, 1, 4096, 8, 128), "starts": True, "bench": True},
    {"shape": (1, 512, 512, 8, 128), "starts": True, "bench": True},
]
GRADIENTS: tuple[str, ...] = ()


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, T, capacity, G, D = case["shape"]
    E = case.get("v_dim", D)
    if case.get("starts"):
        positions = rng.integers(0, capacity - T + 1, B)
    else:
        positions = np.array([rng.permutation(capacity)[:T] for _ in range(B)]).reshape(B, T)
    table: dict[str, Any] = {}
    if "page" in case:  # two pages more than there need be
        blocks, page = capacity // case["page"], case["page"]
        table = {"table": rng.permutation(B * blocks + 2)[: B * blocks].reshape(B, blocks).astype(np.int32)}
        B, capacity = B * blocks + 2, page
    keys = {
        "keys": rng.standard_normal((B, capacity, G, D), np.float32),
        "values": rng.standard_normal((B, capacity, G, E), np.float32),
    }
    B = case["shape"][0]
    return (
        keys
        | {
            "k": rng.standard_normal((B, T, G, D), np.float32),
            "v": rng.standard_normal((B, T, G, E), np.float32),
            "positions": positions.astype(np.int32),
        }
        | table
    )


def forward(
    keys: np.ndarray, values: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, table: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """keys, values (B, capacity, G, D or E), k, v (B, T, G, D or E), positions (B, T) or (B,) -> new keys and values.

    table (B, blocks): keys, values are (pages, page, G, .), position i of sequence b is number i % page of page table[b, i // page].
    """
    B, T = k.shape[:2]
    at = positions if positions.ndim == 2 else positions[:, None] + np.arange(T)
    keys, values, rows = keys.copy(), values.copy(), np.arange(B)[:, None]
    if table is not None:
        rows, at = table[rows, at // keys.shape[1]], at % keys.shape[1]
    keys[rows, at], values[rows, at] = packed(k, keys.dtype), packed(v, values.dtype)
    return keys, values


def packed(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x (..., D) float32 as a cache of that dtype holds it: int8 (..., D + 4)."""
    if np.dtype(dtype) != np.int8:
        return x.astype(dtype)
    x = x.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.abs(x).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
        scale = np.where(scale < np.float32(2.0**-126), np.float32(0), scale)
        scale = np.where(np.isfinite(x).all(axis=-1, keepdims=True), scale, np.float32(np.nan))
        n = np.where(scale > 0, np.rint(x / scale), 0).astype(np.int8)
    return np.concatenate([n, scale.astype(np.float32).view(np.int8)], axis=-1)


def unpacked(x: np.ndarray) -> np.ndarray:
    """The float32 numbers that a cache's array stands for."""
    if x.dtype == ml_dtypes.bfloat16:
        return x.astype(np.float32)
    if x.dtype != np.int8:
        return x
    return x[..., :-4].astype(np.float32) * np.ascontiguousarray(x[..., -4:]).view(np.float32)
