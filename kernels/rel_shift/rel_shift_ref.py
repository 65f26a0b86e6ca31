"""The position and segment scores of Transformer-XL in NumPy: the oracle in float64, the naive peer in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

CASES: list[dict[str, Any]] = [
    {"shape": (2, 5, 3, 7), "keys": 5},
    {"shape": (1, 1, 1, 1), "keys": 1},
    {"shape": (2, 9, 2, 16), "keys": 14, "segments": True, "mask": True},
    {"shape": (1, 33, 2, 31), "keys": 33, "segments": True},
    {"shape": (3, 8, 2, 33), "keys": 40, "mask": True},
    {"shape": (2, 4, 2, 20), "keys": 31, "scattered": True, "segments": True, "mask": True},
    {"shape": (2, 17, 2, 64), "keys": 65, "scattered": True},
    {"shape": (1, 0, 2, 8), "keys": 4},
    {"shape": (0, 3, 2, 8), "keys": 4},
    {"shape": (8, 512, 12, 64), "keys": 512, "bench": True},
    {"shape": (4, 512, 12, 64), "keys": 896, "segments": True, "mask": True, "bench": True},
]
GRADIENTS = ("q", "r", "bias", "segment_bias", "segment_embedding")


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, T, H, D = case["shape"]
    S = case["keys"]
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    total = T + 3 if case.get("scattered") else T  # of which T positions are asked
    starts = np.broadcast_to(total - np.arange(total), (B, total))
    if case.get("scattered"):
        starts = np.stack([row[np.sort(rng.permutation(total)[:T])] for row in starts])
    named = {"q": normal(B, T, H, D), "r": normal(total + S, H, D), "bias": normal(H, D)}
    named |= {"starts": np.ascontiguousarray(starts, np.int32), "keys": S, "scale": D**-0.5}
    if case.get("mask"):
        named["mask"] = np.where(rng.random((B, T, S)) < 0.2, np.float32(-2.5), np.float32(0))
    if case.get("segments"):
        named |= {"segment_bias": normal(H, D), "segment_embedding": normal(2, H, D)}
        named |= {"query_segments": rng.integers(0, 3, (B, T)), "key_segments": rng.integers(0, 3, (B, S))}
    return named


def _rows(starts: np.ndarray, keys: int) -> np.ndarray:
    """(B, T, S): the row of r for every pair."""
    return starts[:, :, None] + np.arange(keys)


def forward(q: Any, r: Any, bias: Any, starts: Any, keys: int, scale: float, **given: Any) -> Any:
    """q (B, T, H, D), r (P, H, D) -> (B, H, T, S)."""
    every = np.einsum("bthd,phd->bhtp", q + bias, r)
    out = np.take_along_axis(every, _rows(starts, keys)[:, None], 3) * q.dtype.type(scale)
    if "segment_bias" in given:
        term = np.einsum("bthd,chd->bhtc", q + given["segment_bias"], given["segment_embedding"]) * q.dtype.type(scale)
        same = (given["query_segments"][:, :, None] == given["key_segments"][:, None])[:, None]
        out = out + np.where(same, term[..., :1], term[..., 1:])
    return out + given["mask"][:, None] if "mask" in given else out


def backward(dy: Any, q: Any, r: Any, bias: Any, starts: Any, keys: int, scale: float, **given: Any) -> dict[str, np.ndarray]:
    """dy (B, H, T, S) -> gradients by argument name."""
    B, T, H, _ = q.shape
    dy = dy * q.dtype.type(scale)
    every = np.zeros((B, H, T, len(r)), q.dtype)
    np.put_along_axis(every, np.broadcast_to(_rows(starts, keys)[:, None], dy.shape), dy, 3)
    dq = np.einsum("bhtp,phd->bthd", every, r)
    grads = {"r": np.einsum("bhtp,bthd->phd", every, q + bias), "bias": dq.sum((0, 1))}
    if "segment_bias" in given:
        same = (given["query_segments"][:, :, None] == given["key_segments"][:, None])[:, None]
        dterm = np.stack([np.where(same, dy, 0).sum(-1), np.where(same, 0, dy).sum(-1)], -1)
        part = np.einsum("bhtc,chd->bthd", dterm, given["segment_embedding"])
        grads["segment_bias"] = part.sum((0, 1))
        grads["segment_embedding"] = np.einsum("bhtc,bthd->chd", dterm, q + given["segment_bias"])
        dq = dq + part
    return grads | {"q": dq}
