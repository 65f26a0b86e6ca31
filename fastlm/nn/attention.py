"""Self-attention with grouped key/value heads, rotary positions and a cache."""

from __future__ import annotations

from typing import Any

from fastlm import ops
from fastlm.nn.cache import Context
from fastlm.nn.linear import Linear
from fastlm.nn.module import Module
from fastlm.nn.rope import Rope
from fastlm.tensor import data, recording


class Attention(Module):
    """Causal multi-head attention. Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.

    x (B, T, C) -> (B, T, C), + residual. Query head h reads key/value head h // (H / G). `head_dim` need not be C / H.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        position: Rope | None = None,
        out_std: float = 0.02,
    ) -> None:
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        self.head_dim = head_dim or d_model // n_head
        if n_head % self.n_kv_head:
            raise ValueError(f"[attention] n_head must be a multiple of n_kv_head, got {n_head} and {self.n_kv_head}.")
        if head_dim is None and d_model % n_head:
            raise ValueError(f"[attention] d_model must be a multiple of n_head, got {d_model} and {n_head}.")
        self.position = position
        self.declare(d_model, bias)
        self.out = Linear(n_head * self.head_dim, d_model, bias, std=out_std)

    def declare(self, d_model: int, bias: bool) -> None:
        self.q = Linear(d_model, self.n_head * self.head_dim, bias)
        self.k = Linear(d_model, self.n_kv_head * self.head_dim, bias)
        self.v = Linear(d_model, self.n_kv_head * self.head_dim, bias)

    def project(self, x: Any) -> tuple[Any, Any, Any]:
        """x (B, T, C) -> q (B, T, H D), k and v (B, T, G D)."""
        return self.q(x), self.k(x), self.v(x)

    def __call__(self, x: Any, context: Context, layer: int, residual: Any = None) -> Any:
        B, T, _ = x.shape
        q, k, v = self.project(x)
        q = _reshape(q, (B, T, self.n_head, self.head_dim))
        k = _reshape(k, (B, T, self.n_kv_head, self.head_dim))
        v = _reshape(v, (B, T, self.n_kv_head, self.head_dim))
        if self.position is not None:
            q, k = self.position(q, k, context)
        if context.cache is not None:
            k, v = context.append(layer, data(k), data(v))
        y = ops.attention(q, k, v, causal=True, lengths=context.lengths)
        return self.out(_reshape(y, (B, T, self.n_head * self.head_dim)), residual=residual)


class FusedAttention(Attention):
    """Attention whose query, key and value matrices are one, stacked in that order: GPT-2."""

    def declare(self, d_model: int, bias: bool) -> None:
        self.sizes = (self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim)
        self.qkv = Linear(d_model, sum(self.sizes), bias)

    def project(self, x: Any) -> tuple[Any, Any, Any]:
        q, k, v = ops.split(self.qkv(x), self.sizes)
        return q, k, v


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """ops.reshape where the tape needs it, else NumPy's own: decoding small models spends its time in calls like these."""
    return ops.reshape(x, shape) if recording(x) else data(x).reshape(shape)
