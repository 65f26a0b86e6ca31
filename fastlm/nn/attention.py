"""Attention: to the sequence itself or to another, with grouped key/value heads, positions, biases and caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastlm import ops
from fastlm.checkpoint.quantized import ROW, QuantizedArray
from fastlm.nn.cache import Context
from fastlm.nn.linear import Linear, side_by_side
from fastlm.nn.module import Module
from fastlm.nn.rope import Rope
from fastlm.tensor import data, recording


@dataclass(frozen=True)
class Sees:
    """The keys that a query sees: those up to itself (causal) or all, and only the last `window` of these."""

    causal: bool
    window: int | None = None


CAUSAL, EVERYTHING = Sees(causal=True), Sees(causal=False)
_WIDE = 64  # numbers of a head from which its products in 8 bits gain more than a few percent of a model's time


class Attention(Module):
    """Multi-head attention. Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.

    x (B, T, C) -> (B, T, C), + residual. Query head h reads key/value head h // (H / G). `head_dim` need not be C / H.

    position: turns queries and keys by their positions (Rope). sees: CAUSAL, EVERYTHING, or Sees(causal, window). scale: of the
    scores, default 1 / sqrt(head_dim). q_norm, k_norm: modules over (B, T, H, D), before the positions. out_bias: default `bias`.
    What is hidden and added besides is said by the call's Context (padding, masks, shared position biases) and by `bias`.
    """

    one_input: tuple[str, ...] = ("q", "k", "v")

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        position: Rope | None = None,
        out_std: float = 0.02,
        *,
        sees: Sees = CAUSAL,
        scale: float | None = None,
        out_bias: bool | None = None,
        q_norm: Module | None = None,
        k_norm: Module | None = None,
        std: float = 0.02,
    ) -> None:
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        self.head_dim = head_dim or d_model // n_head
        if n_head % self.n_kv_head:
            raise ValueError(f"[attention] n_head must be a multiple of n_kv_head, got {n_head} and {self.n_kv_head}.")
        if head_dim is None and d_model % n_head:
            raise ValueError(f"[attention] d_model must be a multiple of n_head, got {d_model} and {n_head}.")
        self.position, self.sees, self.scale = position, sees, scale
        self.declare(d_model, bias, std)
        self.out = Linear(n_head * self.head_dim, d_model, bias if out_bias is None else out_bias, std=out_std)
        self.q_norm, self.k_norm = q_norm, k_norm

    def declare(self, d_model: int, bias: bool, std: float) -> None:
        """The parameters of the projections."""
        self.q = Linear(d_model, self.n_head * self.head_dim, bias, std)
        self.k = Linear(d_model, self.n_kv_head * self.head_dim, bias, std)
        self.v = Linear(d_model, self.n_kv_head * self.head_dim, bias, std)

    def project(self, x: Any) -> tuple[Any, Any, Any]:
        """x (B, T, C) -> q (B, T, H D), k and v (B, T, G D)."""
        q, k, v = side_by_side(x, self.q, self.k, self.v)
        return q, k, v

    def heads(self, x: Any, count: int, norm: Module | None = None) -> Any:
        """(B, T, count D) -> (B, T, count, D), normalised."""
        x = _reshape(x, (*x.shape[:2], count, self.head_dim))
        return x if norm is None else norm(x)

    def joined(self, y: Any, residual: Any) -> Any:
        """The heads' outputs (B, T, H, D) through the output projection."""
        return self.out(_reshape(y, (*y.shape[:2], self.n_head * self.head_dim)), residual=residual)

    def __call__(self, x: Any, context: Context, layer: int, residual: Any = None, bias: Any = None) -> Any:
        """bias: (1 or B, 1 or H, T, S) float32, added to this layer's scores, with its gradient: a relative position bias."""
        q, k, v = self.project(x)
        q = self.heads(q, self.n_head, self.q_norm)
        k = self.heads(k, self.n_kv_head, self.k_norm)
        v = self.heads(v, self.n_kv_head)
        if self.position is not None:
            q, k = self.position(q, k, context)
        if context.cache is None and self._in_8_bits(q, k, v, bias, context):
            if context.offsets is None:
                y = ops.int8_attention(q, k, v, scale=self.scale, lengths=context.lengths)
            else:
                q, k, v = (data(t)[0] for t in (q, k, v))
                y = ops.int8_attention(q, k, v, scale=self.scale, offsets=context.offsets)[None]
            return self.joined(y, residual)
        if context.offsets is not None:
            q, k, v = (_reshape(t, t.shape[1:]) for t in (q, k, v))
            y = ops.attention_packed(q, k, v, context.offsets, self.sees.causal, scale=self.scale, window=self.sees.window)
            return self.joined(_reshape(y, (1, *y.shape)), residual)
        if context.cache is not None:
            k, v = context.append(layer, data(k), data(v))
        bias = _sum(bias, context.bias)
        if layer == context.only_last and bias is not None:
            bias = data(bias)[:, :, -1:]
        y = ops.attention(
            context.asked(q, layer),
            k,
            v,
            self.sees.causal,
            scale=self.scale,
            bias=bias,
            lengths=context.lengths,
            window=self.sees.window,
        )
        return self.joined(y, context.asked(residual, layer))

    def _in_8_bits(self, q: Any, k: Any, v: Any, bias: Any, context: Context) -> bool:
        """Whether heads are multiplied in 8 bits, as the weights are: where a query sees all keys and no gradient is wanted."""
        weight = self.out.weight.data
        return (
            isinstance(weight, QuantizedArray)
            and weight.kind == ROW
            and self.head_dim >= _WIDE
            and self.sees == EVERYTHING
            and bias is None
            and context.bias is None
            and context.device is None
            and context.only_last is None
            and not recording(q, k, v)
        )


class FusedAttention(Attention):
    """Attention whose query, key and value matrices are one, stacked in that order: GPT-2."""

    one_input = ()

    def declare(self, d_model: int, bias: bool, std: float) -> None:
        self.sizes = (self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim)
        self.qkv = Linear(d_model, sum(self.sizes), bias, std)

    def project(self, x: Any) -> tuple[Any, Any, Any]:
        q, k, v = ops.split(self.qkv(x), self.sizes)
        return q, k, v


class CrossAttention(Attention):
    """Attention to another sequence, `context.memory`: its keys and values are computed at first use and kept there."""

    one_input = ("k", "v")

    def keys_values(self, states: Any) -> tuple[Any, Any]:
        """states (B, S, C) -> k and v (B, S, G, D)."""
        k, v = side_by_side(states, self.k, self.v)
        return self.heads(k, self.n_kv_head, self.k_norm), self.heads(v, self.n_kv_head)

    def __call__(self, x: Any, context: Context, layer: int, residual: Any = None, bias: Any = None) -> Any:
        memory = context.memory
        assert memory is not None
        q = self.heads(self.q(x), self.n_head, self.q_norm)
        k, v = memory.keys_values(layer, self.keys_values)
        hidden = memory.padding.bias(x.shape[1])
        y = ops.attention(q, k, v, False, scale=self.scale, bias=_sum(bias, hidden), lengths=memory.padding.lengths)
        return self.joined(y, residual)


def _sum(bias: Any, shared: Any) -> Any:
    return shared if bias is None else bias if shared is None else ops.add_broadcast(bias, shared)


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """ops.reshape where the tape needs it, else NumPy's own: decoding small models spends its time in calls like these."""
    return ops.reshape(x, shape) if recording(x) else data(x).reshape(shape)
