"""Attention in NumPy with the whole score matrix: the oracle in float64, in float32 the naive peer that bounds the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np

# shape: B, T, S, H, G, D. bias: which of (batch, heads) it has. v_dim: E where it is not D. large: more than emulated GPU kernels bear
# in a test; what it has is in smaller cases too.
CASES: list[dict[str, Any]] = [
    {"shape": (2, 7, 7, 2, 2, 8)},
    {"shape": (2, 33, 33, 4, 2, 31), "causal": True},
    {"shape": (1, 130, 130, 2, 2, 64), "causal": True},
    {"shape": (1, 129, 200, 6, 2, 33), "causal": True, "large": True},
    {"shape": (3, 65, 97, 4, 1, 16), "causal": True, "lengths": (97, 70, 66)},
    {"shape": (3, 40, 40, 3, 3, 80), "lengths": (40, 17, 1)},
    {"shape": (2, 100, 100, 2, 1, 32), "causal": True, "window": 37},
    {"shape": (2, 30, 90, 2, 2, 16), "causal": True, "window": 20, "lengths": (90, 45)},
    {"shape": (2, 21, 50, 2, 2, 16), "window": 20, "lengths": (50, 33)},
    {"shape": (2, 33, 70, 4, 4, 20), "bias": (2, 4)},
    {"shape": (3, 33, 70, 4, 2, 24), "bias": (1, 4), "causal": True, "large": True},
    {"shape": (2, 20, 20, 6, 3, 16), "bias": (2, 1), "hidden": 0.3},
    {"shape": (2, 18, 130, 4, 1, 8), "bias": (1, 1), "lengths": (130, 40), "scale": 1.0},
    {"shape": (1, 9, 12, 2, 1, 72), "bias": (1, 1), "v_dim": 130},
    {"shape": (1, 19, 19, 2, 2, 1), "causal": True},
    {"shape": (2, 17, 23, 2, 1, 128), "v_dim": 40},
    {"shape": (1, 20, 65, 3, 3, 256), "v_dim": 1},
    {"shape": (2, 20, 12, 2, 2, 16), "causal": True},
    {"shape": (2, 9, 5, 4, 1, 8), "causal": True, "lengths": (3, 0), "bias": (1, 4)},
    {"shape": (2, 1, 300, 8, 2, 64), "causal": True, "lengths": (300, 41)},
    {"shape": (2, 1, 31, 5, 1, 33)},
    {"shape": (1, 1, 600, 3, 3, 80), "causal": True, "window": 270},
    {"shape": (2, 3, 290, 4, 2, 31), "causal": True, "lengths": (290, 2), "bias": (2, 4), "v_dim": 70, "large": True},
    {"shape": (1, 1, 1, 1, 1, 1)},
    {"shape": (2, 4, 0, 2, 2, 8)},
    {"shape": (2, 0, 5, 2, 2, 8), "causal": True},
    {"shape": (0, 4, 4, 2, 1, 8)},
    {"shape": (1, 128, 128, 12, 12, 64), "causal": True, "bench": True},
    {"shape": (4, 512, 512, 12, 12, 64), "causal": True, "bench": True},
    {"shape": (1, 1024, 1024, 12, 12, 64), "causal": True, "bench": True},
    {"shape": (1, 2048, 2048, 12, 12, 64), "causal": True, "bench": True},
    {"shape": (1, 2048, 2048, 12, 12, 64), "bench": True},
    {"shape": (8, 16, 16, 12, 12, 32), "bench": True},
    {"shape": (8, 64, 64, 12, 12, 32), "bench": True},
    {"shape": (8, 128, 128, 12, 12, 64), "bench": True},
    {"shape": (1, 1, 1024, 32, 8, 128), "bench": True, "forward_only": True},
    {"shape": (8, 1, 1024, 32, 8, 128), "bench": True, "forward_only": True},
    {"shape": (1, 1, 4096, 32, 8, 128), "bench": True, "forward_only": True},
    {"shape": (8, 1, 4096, 32, 8, 128), "bench": True, "forward_only": True},
]
GRADIENTS = ("q", "k", "v", "bias")
# Keys and values in pages, which have no gradient. page: keys of a page; spare: pages that no sequence has. kind: of the cache.
PAGED: list[dict[str, Any]] = [
    {"shape": (2, 1, 192, 4, 2, 64), "causal": True, "lengths": (192, 41), "page": 64, "spare": 3},
    {"shape": (3, 1, 512, 3, 3, 16), "causal": True, "lengths": (300, 1, 0), "page": 256, "spare": 1},
    {"shape": (2, 5, 384, 6, 1, 33), "causal": True, "lengths": (257, 64), "page": 64, "v_dim": 20},
    {"shape": (1, 3, 320, 2, 1, 128), "lengths": (310,), "window": 100, "page": 64, "bias": (1, 2)},
    {"shape": (2, 1, 64, 2, 2, 256), "page": 64},
    {"shape": (2, 40, 192, 4, 2, 32), "causal": True, "lengths": (150, 65), "page": 64, "spare": 2},
    {"shape": (1, 70, 256, 2, 2, 24), "causal": True, "lengths": (129,), "page": 128, "window": 50},
    {"shape": (2, 1, 0, 2, 1, 8), "page": 64},
]


def inputs(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    B, T, S, H, G, D = case["shape"]
    values: dict[str, Any] = {
        "q": rng.standard_normal((B, T, H, D), np.float32),
        "k": rng.standard_normal((B, S, G, D), np.float32),
        "v": rng.standard_normal((B, S, G, case.get("v_dim", D)), np.float32),
        "causal": case.get("causal", False),
        "scale": case.get("scale"),
        "bias": None,
        "lengths": None,
        "window": case.get("window"),
    }
    if "bias" in case:
        values["bias"] = rng.standard_normal((*case["bias"], T, S), np.float32)
        if "hidden" in case:
            values["bias"][rng.random(values["bias"].shape) < case["hidden"]] = -np.inf
    if "lengths" in case:
        values["lengths"] = np.array(case["lengths"], np.int32)
    return values


def paged(case: dict[str, Any], rng: np.random.Generator, hidden: float = np.nan) -> dict[str, Any]:
    """Arguments with keys and values in pages, in any order: what belongs to no key is `hidden`, and so are numbers of no use."""
    x = inputs(case, rng)
    (B, S), page = x["k"].shape[:2], case["page"]
    blocks = S // page
    pages = B * blocks + case.get("spare", 0)
    table = rng.permutation(pages)[: B * blocks].reshape(B, blocks).astype(np.int32)
    lengths = np.full(B, S, np.int32) if x["lengths"] is None else x["lengths"]
    for name in ("k", "v"):
        pool = np.full((pages, page, *x[name].shape[2:]), hidden, np.float32)
        for b, n in enumerate(lengths):
            for i in range(0, n, page):
                pool[table[b, i // page], : n - i] = x[name][b, i : min(n, i + page)]
        x[name] = pool
    table[np.arange(blocks) * page >= lengths[:, None]] = -(1 << 31)
    return x | {"table": table}


def together(x: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with keys and values (B, S, G, .); zeros where there is no page."""
    x = dict(x)
    table, page = x.pop("table"), x["k"].shape[1]
    there = (table >= 0) & (table < len(x["k"]))
    for name in ("k", "v"):
        pages = x[name][np.where(there, table, 0)] if len(x[name]) else np.empty((*table.shape, *x[name].shape[1:]), np.float32)
        pages = np.where(there[..., None, None, None], pages, 0)
        x[name] = pages.reshape(len(table), table.shape[1] * page, *pages.shape[3:])
    return x


def seen(B: int, T: int, S: int, causal: bool, lengths: np.ndarray | None, window: int | None) -> np.ndarray:
    """(B, T, S) bool: whether query t of sequence b sees key s."""
    n = (np.full(B, S) if lengths is None else lengths.astype(np.int64))[:, None, None]
    t, s = np.arange(T)[None, :, None], np.arange(S)[None, None, :]
    high = np.maximum(0, n - T + t + 1) if causal else np.broadcast_to(n, (B, T, 1))
    low = np.zeros_like(high) if window is None else np.maximum(0, high - window)
    return (low <= s) & (s < high)


def _weights(
    q: np.ndarray,
    k: np.ndarray,
    causal: bool,
    scale: float | None,
    bias: np.ndarray | None,
    lengths: np.ndarray | None,
    window: int | None,
) -> np.ndarray:
    """(B, H, T, S): what each query takes of each key; rows that see nothing are zero."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    k = np.repeat(k, H // G, axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * q.dtype.type(D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    scores = np.where(seen(B, T, S, causal, lengths, window)[:, None], scores, q.dtype.type(-np.inf))
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = False,
    scale: float | None = None,
    bias: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    window: int | None = None,
) -> np.ndarray:
    """q (B, T, H, D), k (B, S, G, D), v (B, S, G, E) -> (B, T, H, E)."""
    p = _weights(q, k, causal, scale, bias, lengths, window)
    return np.einsum("bhts,bshe->bthe", p, np.repeat(v, q.shape[2] // k.shape[2], axis=2))


def backward(
    dy: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = False,
    scale: float | None = None,
    bias: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    window: int | None = None,
) -> dict[str, np.ndarray]:
    """dy (B, T, H, E) -> gradients by argument name."""
    (B, _, H, D), (S, G) = q.shape, k.shape[1:3]
    factor = q.dtype.type(D**-0.5 if scale is None else scale)
    p = _weights(q, k, causal, scale, bias, lengths, window)
    kk, vv = np.repeat(k, H // G, axis=2), np.repeat(v, H // G, axis=2)
    dp = np.einsum("bthe,bshe->bhts", dy, vv)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dv = np.einsum("bhts,bthe->bshe", p, dy).reshape(B, S, G, H // G, v.shape[3]).sum(axis=3)
    dk = np.einsum("bhts,bthd->bshd", ds, q).reshape(B, S, G, H // G, D).sum(axis=3) * factor
    grads = {"q": np.einsum("bhts,bshd->bthd", ds, kk) * factor, "k": dk, "v": dv}
    if bias is not None:
        axes = tuple(i for i in (0, 1) if bias.shape[i] == 1)
        grads["bias"] = ds.sum(axis=axes, keepdims=True) if axes else ds
    return grads
