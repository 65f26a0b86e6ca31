"""GPT-3. Brown et al. 2020, arXiv:2005.14165. GPT-2 whose layers are by turns dense and locally banded (section 2.1).

The paper gives no width of the band; `window` = 256 is that of GPT-Neo, an open reproduction. Layer 0 is dense. Where the paper's
table 2.1 cannot be (24 heads of 128 at width 2048; width 5140), the presets have the nearest that can: 16 heads, width 5120.

    ids -> token + position embedding -> [ x += attention(norm(x)); x += mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastlm import ops
from fastlm.backend import Array
from fastlm.models import gpt
from fastlm.models.base import CausalLM, check_config
from fastlm.nn import CAUSAL, MLP, Context, Embedding, FusedAttention, LayerNorm, Module, Sees


@dataclass(frozen=True)
class GPT3Config:
    vocab_size: int = 50257
    context: int = 2048
    d_model: int = 12288
    n_layer: int = 96
    n_head: int = 96
    window: int = 256  # keys that a query of a banded layer sees, itself among them
    eps: float = 1e-5

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {
    "gpt3-small": GPT3Config(d_model=768, n_layer=12, n_head=12),
    "gpt3-medium": GPT3Config(d_model=1024, n_layer=24, n_head=16),
    "gpt3-large": GPT3Config(d_model=1536, n_layer=24, n_head=16),
    "gpt3-xl": GPT3Config(d_model=2048, n_layer=24, n_head=16),
    "gpt3-2.7b": GPT3Config(d_model=2560, n_layer=32, n_head=32),
    "gpt3-6.7b": GPT3Config(d_model=4096, n_layer=32, n_head=32),
    "gpt3-13b": GPT3Config(d_model=5120, n_layer=40, n_head=40),
    "gpt3-175b": GPT3Config(),
}
NOTES = {
    "gpt3-xl": "the paper prints 24 heads of 128, which are not 2048; here 16",
    "gpt3-13b": "the paper prints a width of 5140, which is not 40 heads of 128; here 5120",
}


class Block(Module):
    def __init__(self, c: GPT3Config, layer: int) -> None:
        out_std, sees = 0.02 / math.sqrt(2 * c.n_layer), Sees(True, c.window) if layer % 2 else CAUSAL
        self.attention_norm = LayerNorm(c.d_model, c.eps)
        self.attention = FusedAttention(c.d_model, c.n_head, bias=True, out_std=out_std, sees=sees)
        self.mlp_norm = LayerNorm(c.d_model, c.eps)
        self.mlp = MLP(c.d_model, 4 * c.d_model, "gelu_tanh", True, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class GPT3(CausalLM):
    def __init__(self, config: GPT3Config) -> None:
        c = self.config = check_config(config)
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.position_embedding = Embedding(c.context, c.d_model)
        self.blocks = [Block(c, layer) for layer in range(c.n_layer)]
        self.final_norm = LayerNorm(c.d_model, c.eps)
        self.head = None

    def hidden(self, ids: Array, context: Context) -> Any:
        if context.end > self.config.context:
            raise ValueError(f"[gpt3] ids must end within the context of {self.config.context} positions, got {context.end}.")
        x = ops.add(self.token_embedding(ids), self.position_embedding(context.places))
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


Config, Model = GPT3Config, GPT3

# transformers has no such class: the type is our own, the names are GPT-2's.
HF_TYPE, HF_CLASS = "fastlm-gpt3", "GPT3LMHeadModel"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "window_size": "window",
    "layer_norm_epsilon": "eps",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"activation_function": "gelu_new", "tie_word_embeddings": True}
HF_IGNORED = ()
HF_NAMES = gpt.HF_NAMES
HF_TRANSPOSED = gpt.HF_TRANSPOSED
HF_IGNORED_TENSORS = gpt.HF_IGNORED_TENSORS
HF_PREFIX = gpt.HF_PREFIX
HF_TIED = gpt.HF_TIED
