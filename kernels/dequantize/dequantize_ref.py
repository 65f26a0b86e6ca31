"""Quantised blocks to float32 in NumPy, from ggml's block definitions (ggml-quants.c): the kernel must give the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np

# weights in a block, bytes of a block
BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
CASES: list[dict[str, Any]] = [
    {"kind": kind, "shape": (rows, count * values)}
    for kind, (values, _) in BLOCKS.items()
    for rows, count in ((0, 1), (1, 1), (31, 3), (65, 5))
] + [{"kind": kind, "shape": (4096, 4096), "bench": True} for kind in BLOCKS]
GRADIENTS = ()


def random_blocks(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(out, bytes of a row): every bit random, so halves are now and then subnormal, infinite or not a number."""
    values, size = BLOCKS[kind]
    return rng.integers(0, 256, (shape[0], shape[1] // values * size), np.uint8)


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {"kind": case["kind"], "shape": case["shape"], "blocks": random_blocks(case["kind"], case["shape"], rng)}


def forward(kind: str, shape: tuple[int, int], blocks: np.ndarray) -> np.ndarray:
    """blocks (out, bytes of a row) uint8 -> (out, in) float32."""
    _, size = BLOCKS[kind]
    with np.errstate(all="ignore"):
        return _DECODE[kind](blocks.reshape(-1, size)).reshape(shape)


def _half(b: np.ndarray) -> np.ndarray:
    """(N, 2) bytes -> (N, 1) float32."""
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(b: np.ndarray) -> np.ndarray:
    """(N, n) bytes -> (N, 2, n): low halves, then high halves."""
    return np.stack([b & 15, b >> 4], axis=1)


def _fifth(b: np.ndarray) -> np.ndarray:
    """(N, 4) bytes of bits -> (N, 32), shifted to bit 4."""
    return np.unpackbits(b, axis=1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 2:]).reshape(-1, 32).astype(np.float32) - np.float32(8)
    return _half(b[:, :2]) * q


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).reshape(-1, 32).astype(np.float32) + _half(b[:, 2:4])


def _q5_0(b: np.ndarray) -> np.ndarray:
    q = (_nibbles(b[:, 6:]).reshape(-1, 32) | _fifth(b[:, 2:6])).astype(np.float32) - np.float32(16)
    return _half(b[:, :2]) * q


def _q5_1(b: np.ndarray) -> np.ndarray:
    q = (_nibbles(b[:, 8:]).reshape(-1, 32) | _fifth(b[:, 4:8])).astype(np.float32)
    return _half(b[:, :2]) * q + _half(b[:, 2:4])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes (N, 12) of Q4_K and Q5_K -> scales and minima (N, 8, 1) float32, six bits each."""
    a, m, both = b[:, :4], b[:, 4:8], b[:, 8:]
    scale = np.concatenate([a & 63, (both & 15) | (a >> 6) << 4], axis=1)
    minimum = np.concatenate([m & 63, (both >> 4) | (m >> 6) << 4], axis=1)
    return scale.astype(np.float32)[..., None], minimum.astype(np.float32)[..., None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    scale, minimum = _scales(b[:, 4:16])
    q = np.stack([_nibbles(b[:, 16 + 32 * j : 48 + 32 * j]) for j in range(4)], axis=1).reshape(-1, 8, 32).astype(np.float32)
    return (_half(b[:, :2])[..., None] * scale) * q - _half(b[:, 2:4])[..., None] * minimum


def _q5_k(b: np.ndarray) -> np.ndarray:
    scale, minimum = _scales(b[:, 4:16])
    low = np.stack([_nibbles(b[:, 48 + 32 * j : 80 + 32 * j]) for j in range(4)], axis=1).reshape(-1, 8, 32)
    high = np.stack([(b[:, 16:48] >> j & 1) << 4 for j in range(8)], axis=1)
    return (_half(b[:, :2])[..., None] * scale) * (low | high).astype(np.float32) - _half(b[:, 2:4])[..., None] * minimum


def _q6_k(b: np.ndarray) -> np.ndarray:
    scale = _half(b[:, 208:])[..., None] * b[:, 192:208].view(np.int8).astype(np.float32)[..., None]  # (N, 16, 1)
    parts = []
    for half in range(2):
        low, high = b[:, 64 * half : 64 * half + 64], b[:, 128 + 32 * half : 160 + 32 * half]
        quarters = (low[:, :32] & 15, low[:, 32:] & 15, low[:, :32] >> 4, low[:, 32:] >> 4)
        parts += [q | (high >> 2 * i & 3) << 4 for i, q in enumerate(quarters)]
    q = np.concatenate(parts, axis=1).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    return scale * q


_DECODE = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
