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


BEYOND = 2  # codes of a row of x that may have more than 8 bits


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (M, K) finite float32 -> codes (M, K), at most 127 * 256 in magnitude and BEYOND of a row beyond 127, and scales (M,) float32."""
    sizes = -np.sort(-np.abs(x), axis=1)[:, : BEYOND + 1]
    sizes = np.pad(sizes, ((0, 0), (0, BEYOND + 1 - sizes.shape[1])))
    largest = np.maximum(sizes[:, BEYOND], sizes[:, 0] * np.float32(1 / 256))
    live = largest >= np.float32(2.0**-100)
    safe = np.where(live, largest, np.float32(1))
    scales = np.where(live, safe * np.float32(1 / np.float32(127)), np.float32(0))
    scaled = np.where(live[:, None], x, np.float32(0)) * (np.float32(127) / safe)[:, None]
    return np.rint(scaled), scales


def forward(x: np.ndarray, weight: QuantizedArray) -> np.ndarray:
    """x (M, K), taken as float32, weight (N, K) -> (M, N): exact sums, then float32 as int8_rows.h writes it down."""
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        if weight.columns is not None:
            x = x * weight.columns
        sane = np.isfinite(x).all(axis=1)
        codes, scales = rounded(np.where(sane[:, None], x, np.float32(0)))
        q = weight.blocks[:, 4:].view(np.int8)
        d = np.ascontiguousarray(weight.blocks[:, :4]).view(np.float32)[:, 0]
        sums = codes.astype(np.float64) @ q.T.astype(np.float64)  # whole numbers below 2^53
        y: np.ndarray = sums.astype(np.float32) * (d * scales[:, None])
        y[~sane] = np.nan
    return y
