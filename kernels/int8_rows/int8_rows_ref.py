"""A linear layer with weights and activations of 8 bits, one scale for each row of both, in NumPy: the kernel gives these bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm.checkpoint.quantized import QuantizedArray

CASES: list[dict[str, Any]] = [
    {"rows": rows, "out": out, "in": K}
    for rows, out, K in (
        (1, 1, 1), (0, 5, 3), (2, 31, 33), (3, 33, 8), (4, 64, 12), (7, 18, 1023), (13, 70, 257), (33, 130, 96), (5, 0, 4), (3, 20, 0),
        (67, 100, 770)
    )
] + [
    {"rows": rows, "out": out, "in": K, "bench": True}
    for out, K in ((768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384))  # BERT-base, MiniLM
    for rows in ((1, 8, 1024) if K > 384 and out != K else (1024,))
]  # fmt: skip
GRADIENTS = ()  # that of x is the dequantised weight's: straight through the rounding


def random_weight(shape: tuple[int, int], rng: np.random.Generator, with_columns: bool = True) -> QuantizedArray:
    """Random codes and columns; scales of the size that real weights have."""
    blocks = np.empty((shape[0], shape[1] + 4), np.uint8)
    scales = np.abs(0.001 * rng.standard_normal((shape[0], 1))).astype(np.float32)
    blocks[:, :4] = scales.view(np.uint8).reshape(-1, 4)
    blocks[:, 4:] = rng.integers(-127, 128, shape, np.int8).view(np.uint8)
    columns = np.exp(0.5 * rng.standard_normal(shape[1])).astype(np.float32) if with_columns else None
    return QuantizedArray("Q8_ROW", shape, blocks, columns=columns)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x = rng.standard_normal((case["rows"], case["in"]), np.float32)
    return {"x": x, "weight": random_weight((case["out"], case["in"]), rng)}


EXACT = 2  # numbers of a row of x that are not rounded


def taken(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (M, K) finite -> x with zeros where the largest magnitudes were, these (M, EXACT), and where they were."""
    x, rows = x.copy(), np.arange(len(x))
    values, places = np.zeros((len(x), EXACT), np.float32), np.zeros((len(x), EXACT), int)
    for e in range(EXACT if x.size else 0):
        places[:, e] = np.abs(x).argmax(axis=1)
        values[:, e] = x[rows, places[:, e]]
        x[rows, places[:, e]] = 0
    return x, values, places


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (M, K) finite float32 -> codes (M, K) int8 and scales (M,) float32."""
    largest = np.abs(x).max(axis=1, initial=0.0)
    live = largest >= np.float32(2.0**-100)
    safe = np.where(live, largest, np.float32(1))
    scales = np.where(live, safe * np.float32(1 / np.float32(127)), np.float32(0))
    scaled = np.where(live[:, None], x, np.float32(0)) * (np.float32(127) / safe)[:, None]
    return np.rint(scaled).astype(np.int8), scales


def forward(x: np.ndarray, weight: QuantizedArray) -> np.ndarray:
    """x (M, K), taken as float32, weight (N, K) -> (M, N): exact sums, then float32 as int8_rows.h writes it down."""
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        if weight.columns is not None:
            x = x * weight.columns
        sane = np.isfinite(x).all(axis=1)
        x, values, places = taken(np.where(sane[:, None], x, np.float32(0)))
        codes, scales = rounded(x)
        q = weight.blocks[:, 4:].view(np.int8)
        d = np.ascontiguousarray(weight.blocks[:, :4]).view(np.float32)[:, 0]
        sums = codes.astype(np.float64) @ q.T.astype(np.float64)  # whole numbers below 2^53
        exact = values[:, :1] * q.T.astype(np.float32)[places[:, 0]] if x.size else np.zeros(sums.shape, np.float32)
        for e in range(1, EXACT if x.size else 1):
            exact = exact + values[:, e, None] * q.T.astype(np.float32)[places[:, e]]
        y: np.ndarray = sums.astype(np.float32) * (d * scales[:, None]) + d * exact
        y[~sane] = np.nan
    return y
