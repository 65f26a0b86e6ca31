"""Mistral 7B. Jiang et al. 2023, arXiv:2310.06825. LLaMA's block, each query seeing only the last `window` keys where one is set.

ids -> embedding -> [ x += attention(norm(x)); x += gated_mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm.backend import Array
from fastlm.models import llama
from fastlm.models.base import CausalLM, check_config
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Linear, Module, RMSNorm, Rope, Sees, rope_scaling


@dataclass(frozen=True)
class MistralConfig:
    vocab_size: int = 32000
    context: int = 131072
    d_model: int = 4096
    d_ff: int = 14336
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 8
    head_dim: int = 128
    window: int | None = 4096
    eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False


PRESETS = {
    "mistral-7b": MistralConfig(context=32768, eps=1e-5),
    "mistral-7b-v0.3": MistralConfig(vocab_size=32768, context=32768, window=None, eps=1e-5, rope_base=1e6),
}


class Block(Module):
    def __init__(self, c: MistralConfig, rope: Rope) -> None:
        out_std, sees = 0.02 / math.sqrt(2 * c.n_layer), Sees(True, c.window)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.attention = Attention(c.d_model, c.n_head, c.n_kv_head, c.head_dim, False, rope, out_std, sees=sees)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        self.mlp = GatedMLP(c.d_model, c.d_ff, "silu", False, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class Mistral(CausalLM):
    def __init__(self, config: MistralConfig) -> None:
        c = self.config = check_config(config)
        rope = Rope(c.head_dim, c.rope_base, rope_scaling(c.rope_scaling, c.context))
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.blocks = [Block(c, rope) for _ in range(c.n_layer)]
        self.final_norm = RMSNorm(c.d_model, c.eps)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.token_embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


Config, Model = MistralConfig, Mistral

HF_TYPE, HF_CLASS = "mistral", "MistralForCausalLM"
HF_CONFIG = {k: v for k, v in llama.HF_CONFIG.items() if not k.endswith("bias")} | {"sliding_window": "window"}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"hidden_act": "silu"}
HF_IGNORED = ("attention_dropout",)
HF_NAMES = llama.HF_NAMES
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = llama.HF_IGNORED_TENSORS
HF_PREFIX = llama.HF_PREFIX
HF_TIED = llama.HF_TIED


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """As LLaMA's, with Mistral's own number of key/value heads where the key is absent."""
    return llama.hf_defaults({"num_key_value_heads": 8} | raw)
