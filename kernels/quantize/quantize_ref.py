"""float32 rows to ggml's blocks in NumPy, from ggml-quants.c: the kernel must give the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
CASES: list[dict[str, Any]] = [
    {"kind": kind, "shape": shape} for kind in KINDS for shape in ((0, 32), (1, 32), (17, 96), (33, 1024))
] + [{"kind": kind, "shape": (4096, 4096), "bench": True} for kind in KINDS]
GRADIENTS = ()


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {"w": rng.standard_normal(case["shape"], np.float32), "kind": case["kind"]}


def forward(w: np.ndarray, kind: str) -> np.ndarray:
    """w (rows, K), taken as float32 -> (rows, bytes of a row) uint8."""
    w = w.astype(np.float32)
    x, shape = (
        w.reshape(-1, 32),
        (w.shape[0], w.shape[1] // 32 * {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}[kind]),
    )
    if kind == "Q8_0":
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        scaled = x * _inverse(d)
        whole = np.floor(np.abs(scaled))
        q = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))
        return np.concatenate([_half(d), q.astype(np.int8).view(np.uint8)], axis=1).reshape(shape)
    most = 31 if kind[1] == "5" else 15
    middle = (most + 1) // 2
    if kind[3] == "1":
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        d = (high - low) / np.float32(most)
        q, head = (x - low) * _inverse(d) + np.float32(0.5), [_half(d), _half(low)]
    else:
        largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
        d = largest / np.float32(-middle)
        q, head = x * _inverse(d) + np.float32(middle + 0.5), [_half(d)]
    codes = np.trunc(q).astype(np.uint8).clip(0, most)
    if most == 31:
        head.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
    low_bits = codes & 15
    return np.concatenate([*head, low_bits[:, :16] | low_bits[:, 16:] << 4], axis=1).reshape(shape)


def _inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / d
    return np.where((d == 0) | np.isinf(inverse), np.float32(0), inverse)


def _half(d: np.ndarray) -> np.ndarray:
    """(N, 1) float32 -> (N, 2) bytes."""
    return d.astype("<f2").view(np.uint8)
