"""Gated activation in NumPy: the oracle in float64, and in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np

# By file name: an oracle is also read by interpreters that have no fastlm (benchmarks/worker.py).
act = runpy.run_path(str(Path(__file__).parent.parent / "activation" / "activation_ref.py"))["act"]

CASES: list[dict[str, Any]] = [
    {"shape": (2, 3, 48), "kind": "silu"},
    {"shape": (2, 3, 33), "kind": "silu", "packed": True},
    {"shape": (5, 1), "kind": "gelu", "packed": True},
    {"shape": (31,), "kind": "gelu_tanh"},
    {"shape": (7, 1023), "kind": "gelu_tanh", "packed": True},
    {"shape": (0, 16), "kind": "silu", "packed": True},
    {"shape": (3, 0), "kind": "relu"},
    {"shape": (3, 9001), "kind": "gelu", "packed": True},
    {"shape": (3, 40), "kind": "relu", "packed": True},
    {"shape": (4096, 1536), "kind": "silu", "bench": True},
    {"shape": (2048, 5632), "kind": "silu", "packed": True, "bench": True},
    {"shape": (1, 5632), "kind": "silu", "bench": True},
]
GRADIENTS = ("gate", "up")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """gate and up, with "packed" the two halves of one array."""
    *lead, F = case["shape"]
    both = rng.standard_normal((*lead, 2 * F), np.float32) * np.float32(2)
    gate, up = both[..., :F], both[..., F:]
    if not case.get("packed"):
        gate, up = gate.copy(), up.copy()
    return {"gate": gate, "up": up, "kind": case["kind"]}


def forward(gate: np.ndarray, up: np.ndarray, kind: str) -> np.ndarray:
    """gate, up (..., F) -> y (..., F)."""
    return act(gate, kind)[0] * up


def backward(dy: np.ndarray, gate: np.ndarray, up: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """dy (..., F) -> gradients by argument name."""
    a, derivative = act(gate, kind)
    return {"gate": dy * up * derivative, "up": dy * a}
