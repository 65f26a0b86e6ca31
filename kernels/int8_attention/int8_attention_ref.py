"""Attention in 8 bits: codes and scales of q, k and v as the kernel has them, the rest in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"B": B, "T": T, "S": S, "H": H, "G": G, "D": D, "E": E}
    for B, T, S, H, G, D, E in (
        (1, 1, 1, 1, 1, 1, 1), (2, 5, 3, 2, 1, 7, 9), (1, 31, 33, 4, 2, 32, 32), (2, 64, 65, 3, 3, 64, 64), (1, 3, 130, 2, 2, 80, 48),
        (1, 300, 17, 2, 1, 12, 100), (2, 4, 0, 2, 2, 8, 8), (0, 4, 4, 2, 2, 8, 8), (1, 7, 600, 1, 1, 64, 64), (1, 2, 20, 1, 1, 1023, 1)
    )
] + [
    {"B": B, "T": T, "S": T, "H": H, "G": H, "D": D, "E": D, "bench": True}
    for B, T, H, D in ((8, 128, 12, 64), (32, 32, 12, 32), (2, 512, 12, 64))  # BERT-base, MiniLM
]  # fmt: skip
GRADIENTS = ()


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, T, S, H, G, D, E = (case[name] for name in "BTSHGDE")
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((B, T, H, D), (B, S, G, D), (B, S, G, E)))
    v *= np.exp(2 * rng.standard_normal((B, S, G, 1))).astype(np.float32)  # values of different sizes
    return {"q": 2 * q, "k": k, "v": v}


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (..., D) float32 -> codes and scales (..., 1) as float64."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    live = largest >= np.float32(2.0**-100)
    safe = np.where(live, largest, np.float32(1))
    codes = np.rint(x * np.where(live, np.float32(127) / safe, np.float32(0)))
    return codes.astype(np.float64), np.where(live, safe * (np.float32(1) / np.float32(127)), np.float32(0)).astype(np.float64)


def values(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v (S, G, E) of one sequence -> codes and scales (S, G, 1): a scale is at least 2^-24 of the head's largest."""
    largest = np.abs(v).max(axis=-1, keepdims=True)
    largest = np.maximum(largest, np.maximum(largest.max(axis=0) * np.float32(2.0**-24), np.float32(2.0**-100)))
    codes = np.rint(v * (np.float32(127) / largest)).astype(np.float64)
    return codes, (largest * (np.float32(1) / np.float32(127))).astype(np.float64)


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, weigh: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """y (B, T, H, E) float64, with weights in 8 bits or, without `weigh`, as they are; and the most that rounding them can change."""
    (B, T, H, D), (S, G, E) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    y, bound = np.zeros((B, T, H, E)), np.zeros((B, T, H, E))
    scale = D**-0.5 if scale is None else scale
    for b in range(B if S else 0):
        (qc, qs), (kc, ks), (vc, vs) = rounded(q[b]), rounded(k[b]), values(v[b])
        for h in range(H):
            g = h // (H // G)
            t = (qc[:, h] @ kc[:, g].T) * ks[:, g, 0] * (qs[:, h] * scale * np.log2(np.e)) + np.log2(vs[:, g, 0])
            e = 255 * np.exp2(t - t.max(axis=1, keepdims=True))
            total = (e / vs[:, g, 0]).sum(axis=1, keepdims=True)
            y[b, :, h] = (np.rint(e) if weigh else e) @ vc[:, g] / total
            bound[b, :, h] = 0.5 * np.abs(vc[:, g]).sum(axis=0) / total
    return y, bound
