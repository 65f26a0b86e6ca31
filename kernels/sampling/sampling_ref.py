"""Sampling in NumPy with full sorts: the oracle. Its weights have the kernel's bits, so tokens compare exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (1, 1)},
    {"shape": (3, 5), "top_k": 2, "ties": True},
    {"shape": (2, 31), "top_p": 0.9},
    {"shape": (2, 33), "min_p": 0.1, "temperature": 0.7},
    {"shape": (1, 257), "top_p": 0.5, "ties": True},
    {"shape": (2, 1023), "top_k": 50, "top_p": 0.9, "temperature": 0.8},
    {"shape": (2, 1023), "top_k": 400, "top_p": 0.9, "ties": True},
    {"shape": (2, 4099), "top_p": 0.9, "spread": 1.0},
    {"shape": (2, 4099), "top_p": 0.3, "ties": True},
    {"shape": (2, 4099), "top_k": 1000, "min_p": 0.01, "penalty": 1.3},
    {"shape": (1, 4099), "temperature": 0.0, "penalty": 1.3, "ties": True},
    {"shape": (1, 3000), "top_p": 0.7, "spread": 0.0},
    {"shape": (1, 4200), "top_p": 0.9, "spread": 0.002, "penalty": 1.1},  # all in one bucket
    {"shape": (1, 50257), "top_p": 0.9, "spread": 1.0, "penalty": 1.1, "large": True},
    {"shape": (1, 50257), "top_p": 0.9, "spread": 0.002, "large": True},
    {"shape": (2, 50257), "masked": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8, "large": True},
    {"shape": (1, 50257), "bench": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8},
    {"shape": (1, 128256), "bench": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8},
    {"shape": (1, 50257), "bench": True, "top_p": 0.9, "spread": 1.0},
    {"shape": (1, 128256), "bench": True, "top_p": 0.9, "spread": 1.0},
    {"shape": (1, 50257), "bench": True, "temperature": 0.0},
    {"shape": (1, 50257), "bench": True},
]
GRADIENTS = ()


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, V = case["shape"]
    logits = rng.standard_normal((B, V), np.float32) * np.float32(case.get("spread", 3.0))
    if case.get("ties"):
        logits = np.round(logits * 2) / np.float32(2)
    if case.get("masked"):
        logits[rng.random((B, V)) < 0.5] = -np.inf
    return {
        "logits": logits,
        "temperature": case.get("temperature", 1.0),
        "top_k": case.get("top_k", 0),
        "top_p": case.get("top_p", 1.0),
        "min_p": case.get("min_p", 0.0),
        "repetition_penalty": case.get("penalty", 1.0),
        "previous": rng.integers(-1, V, (B, 64)).astype(np.int32),
        "uniform": rng.random(B),
    }


def exponential(x: np.ndarray) -> np.ndarray:
    """e^x for x <= 0 in float32: multiplications and additions alone, in the kernel's order."""
    f = np.float32
    clamped = np.maximum(x, f(-88))
    n = np.rint(clamped * f(1.44269504))
    r = (clamped - n * f(0.693145751953125)) - n * f(1.42860682e-6)
    p = np.full_like(r, 1.38888889e-3)
    for c in (8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5):
        p = p * r + f(c)
    p = ((p * r) * r + r) + f(1)
    scaled = (p.view(np.int32) + (n.astype(np.int32) << 23)).view(f)
    return np.where(x < f(-87), f(0), scaled)


def penalise(logits: np.ndarray, previous: np.ndarray, penalty: float) -> np.ndarray:
    """One row, (V,): the repetition penalty."""
    ids, penalty = previous[previous >= 0], logits.dtype.type(penalty)
    logits = logits.copy()
    logits[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return logits


def kept(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """One row, (V,), penalised: which tokens stay, (V,) bool, and the weights, (V,) float64, before normalisation."""
    z = logits / np.float32(temperature)
    stay = z > -np.inf
    if 0 < top_k < z.size:
        stay &= z >= np.sort(z)[-top_k]
    weights = np.where(stay, exponential(z - z.max()), np.float32(0)).astype(np.float64)
    if top_p < 1:
        order = np.argsort(weights, kind="stable")
        drop = np.cumsum(weights[order]) <= (1 - top_p) * weights.sum() * (1 + 2.0**-20)
        drop[-1] = False
        stay[order[drop]] = False
    stay &= weights >= np.float32(np.float64(np.float32(min_p)) * (1 - 2.0**-20))
    return stay, weights


def forward(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    previous: np.ndarray | None = None,
    uniform: np.ndarray | None = None,
) -> np.ndarray:
    """logits (B, V) -> tokens (B,). float32 as the operation defines it, whatever is given."""
    tokens = []
    for b, row in enumerate(logits.astype(np.float32)):
        if previous is not None and repetition_penalty != 1:
            row = penalise(row, previous[b], repetition_penalty)
        if temperature == 0:
            tokens.append(int(np.argmax(row)))
            continue
        stay, weights = kept(row, temperature, top_k, top_p, min_p)
        cumulative = np.cumsum(np.where(stay, weights, 0.0))
        tokens.append(int(np.searchsorted(cumulative, uniform[b] * cumulative[-1], side="right")))
    return np.array(tokens, np.int32)
