"""Gemma (1). Gemma Team 2024, arXiv:2403.08295. LLaMA's block with GeGLU, norms that multiply by 1 + weight, embeddings times
sqrt(d_model), head tied. Gemma 2 is not this: it caps its attention scores, which the attention kernel does not do.

    ids -> sqrt(d) embedding -> [ x += attention(norm(x)); x += gated_mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models import llama
from fastlm.models.base import CausalLM, check_config
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Linear, Module, Rope, parameter, rope_scaling


@dataclass(frozen=True)
class GemmaConfig:
    vocab_size: int = 256000
    context: int = 8192
    d_model: int = 3072
    d_ff: int = 24576
    n_layer: int = 28
    n_head: int = 16
    n_kv_head: int = 16
    head_dim: int = 256
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = True
    attention_bias: bool = False


PRESETS = {
    "gemma-2b": GemmaConfig(d_model=2048, d_ff=16384, n_layer=18, n_head=8, n_kv_head=1),
    "gemma-7b": GemmaConfig(),
}


class OffsetRMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight): weight decay pulls the factor to 1."""

    def __init__(self, d_model: int, eps: float) -> None:
        self.weight = parameter(d_model)
        self.ones = np.ones(d_model, np.float32)
        self.eps = eps

    def __call__(self, x: Any) -> Any:
        return ops.rms_norm(x, ops.add(self.weight, self.ones), self.eps)


class Block(Module):
    def __init__(self, c: GemmaConfig, rope: Rope) -> None:
        out_std = 0.02 / math.sqrt(2 * c.n_layer)
        self.attention_norm = OffsetRMSNorm(c.d_model, c.eps)
        self.attention = Attention(c.d_model, c.n_head, c.n_kv_head, c.head_dim, c.attention_bias, rope, out_std)
        self.mlp_norm = OffsetRMSNorm(c.d_model, c.eps)
        self.mlp = GatedMLP(c.d_model, c.d_ff, c.activation, False, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class Gemma(CausalLM):
    def __init__(self, config: GemmaConfig) -> None:
        c = self.config = check_config(config)
        rope = Rope(c.head_dim, c.rope_base, rope_scaling(c.rope_scaling, c.context))
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.blocks = [Block(c, rope) for _ in range(c.n_layer)]
        self.final_norm = OffsetRMSNorm(c.d_model, c.eps)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = ops.scale(self.token_embedding(ids), math.sqrt(self.config.d_model))
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


Config, Model = GemmaConfig, Gemma

HF_TYPE, HF_CLASS = "gemma", "GemmaForCausalLM"
HF_CONFIG = {k: v for k, v in llama.HF_CONFIG.items() if k != "mlp_bias"} | {"hidden_act": "activation"}
HF_VALUES = {"activation": {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}}  # "gelu" in older files means the tanh form
HF_FIXED = {"use_bidirectional_attention": None}
HF_IGNORED = ("attention_dropout",)
HF_NAMES = llama.HF_NAMES
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = llama.HF_IGNORED_TENSORS
HF_PREFIX = llama.HF_PREFIX
HF_TIED = llama.HF_TIED


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """As LLaMA's, with Gemma's own heads; `hidden_activation`, which a short-lived version wrote, is the activation."""
    raw = llama.hf_defaults({"num_key_value_heads": 16, "head_dim": 256} | raw)
    written = raw.pop("hidden_activation", None)
    return raw if written is None else raw | {"hidden_act": written}


GGUF_CONFIG, GGUF_NAMES = llama.GGUF_CONFIG, llama.GGUF_NAMES


def gguf_read(tensors: Mapping[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """The norms' weights are there with the 1 added that the model adds."""
    return {name: tensor - np.float32(1) if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}
