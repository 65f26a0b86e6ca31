"""Qwen3 (dense). Yang et al. 2025, arXiv:2505.09388. LLaMA's block with an RMS norm on every head's queries and keys.

ids -> embedding -> [ x += attention(norm(x)); x += gated_mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm.backend import Array
from fastlm.models import llama, qwen2
from fastlm.models.base import CausalLM, Id, check_config
from fastlm.models.qwen2 import sees
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Linear, Module, RMSNorm, Rope, Sees, rope_scaling


@dataclass(frozen=True)
class Qwen3Config:
    vocab_size: int = 151936
    context: int = 32768
    d_model: int = 4096
    d_ff: int = 22016
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    head_dim: int = 128
    windowed: bool = False  # True: layers from full_layers on see only the last `window` keys
    window: int | None = 4096
    full_layers: Id = 28  # a count; 0 is allowed
    eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False
    attention_bias: bool = False


def _preset(d_model: int, d_ff: int, n_layer: int, n_head: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        context=40960,
        d_model=d_model,
        d_ff=d_ff,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=8,
        window=None,
        rope_base=1e6,
        tied=tied,
    )


PRESETS = {
    "qwen3-0.6b": _preset(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _preset(2048, 6144, 28, 16, True),
    "qwen3-4b": _preset(2560, 9728, 36, 32, True),
    "qwen3-8b": _preset(4096, 12288, 36, 32, False),
    "qwen3-14b": _preset(5120, 17408, 40, 40, False),
    "qwen3-32b": _preset(5120, 25600, 64, 64, False),
}


class Block(Module):
    def __init__(self, c: Qwen3Config, rope: Rope, sees: Sees) -> None:
        out_std = 0.02 / math.sqrt(2 * c.n_layer)
        q_norm, k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.attention = Attention(
            c.d_model, c.n_head, c.n_kv_head, c.head_dim, c.attention_bias, rope, out_std, sees=sees, q_norm=q_norm, k_norm=k_norm
        )
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        self.mlp = GatedMLP(c.d_model, c.d_ff, "silu", False, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class Qwen3(CausalLM):
    def __init__(self, config: Qwen3Config) -> None:
        c = self.config = check_config(config)
        rope = Rope(c.head_dim, c.rope_base, rope_scaling(c.rope_scaling, c.context))
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.blocks = [Block(c, rope, sees(c, layer)) for layer in range(c.n_layer)]
        self.final_norm = RMSNorm(c.d_model, c.eps)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.token_embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


Config, Model = Qwen3Config, Qwen3

HF_TYPE, HF_CLASS = "qwen3", "Qwen3ForCausalLM"
HF_CONFIG = qwen2.HF_CONFIG | {"attention_bias": "attention_bias"}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = qwen2.HF_FIXED
HF_IGNORED = qwen2.HF_IGNORED
HF_NAMES = llama.HF_NAMES | {
    "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = llama.HF_IGNORED_TENSORS
HF_PREFIX = llama.HF_PREFIX
HF_TIED = llama.HF_TIED


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """As Qwen2's, with 128 dimensions a head whatever the width."""
    return qwen2.hf_defaults({"head_dim": 128} | raw)


GGUF_CONFIG = llama.GGUF_CONFIG
GGUF_NAMES = llama.GGUF_NAMES | {
    "blocks.{}.attention.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.attention.k_norm": "blk.{}.attn_k_norm",
}
