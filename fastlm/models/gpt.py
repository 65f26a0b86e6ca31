"""GPT-2. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

Learned positions, layer norm before each part, GELU in its tanh form, biases, head tied to the token embedding.

    ids -> token + position embedding -> [ x += attention(norm(x)); x += mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import CausalLM, check_config, names
from fastlm.nn import MLP, Context, Embedding, FusedAttention, LayerNorm, Linear, Module


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context: int = 1024
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    d_ff: int | None = None  # None: 4 d_model
    activation: str = "gelu_tanh"
    eps: float = 1e-5
    tied: bool = True
    bias: bool = True  # False: no bias in any linear layer or norm, as nanoGPT trains

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(d_model=1024, n_layer=24, n_head=16),
    "gpt2-large": GPTConfig(d_model=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPTConfig(d_model=1600, n_layer=48, n_head=25),
    "gpt-char": GPTConfig(vocab_size=65, context=64, d_model=128, n_layer=4, n_head=4, bias=False),  # nanoGPT's CPU configuration
}


class Block(Module):
    def __init__(self, c: GPTConfig) -> None:
        out_std = 0.02 / math.sqrt(2 * c.n_layer)  # keeps the residual stream's variance, section 2.3 of the paper
        self.attention_norm = LayerNorm(c.d_model, c.eps, c.bias)
        self.attention = FusedAttention(c.d_model, c.n_head, bias=c.bias, out_std=out_std)
        self.mlp_norm = LayerNorm(c.d_model, c.eps, c.bias)
        self.mlp = MLP(c.d_model, c.d_ff or 4 * c.d_model, c.activation, c.bias, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class GPT(CausalLM):
    def __init__(self, config: GPTConfig) -> None:
        c = self.config = check_config(config)
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.position_embedding = Embedding(c.context, c.d_model)
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.final_norm = LayerNorm(c.d_model, c.eps, c.bias)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, ids: Array, context: Context) -> Any:
        if context.end > self.config.context:
            raise ValueError(f"[gpt] ids must end within the context of {self.config.context} positions, got {context.end}.")
        x = ops.add(self.token_embedding(ids), self.position_embedding(context.places))
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


Config, Model = GPTConfig, GPT

HF_TYPE, HF_CLASS = "gpt2", "GPT2LMHeadModel"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "d_ff",
    "activation_function": "activation",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tied",
    "bias": "bias",  # ours: written only where it is False
}
HF_VALUES = {
    "activation": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
}
HF_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# fmt: off
HF_IGNORED = (
    "n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj",
)
# fmt: on
HF_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
    "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
HF_TRANSPOSED = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")  # Conv1D: (in, out)
HF_IGNORED_TENSORS = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)  # the causal mask
HF_PREFIX = "transformer."  # left out in files of the bare model
HF_TIED = {"lm_head.weight": "transformer.wte.weight"}


def hf_write(tensors: dict[str, Array], model: GPT) -> dict[str, Array]:
    """With zeros for the biases that transformers' GPT-2 has and a model with `bias=False` has not."""
    if model.config.bias:
        return tensors
    zeros = {}
    for ours, theirs in names(HF_NAMES, model).items():
        if ours.startswith(("blocks.", "final_norm.")):
            zeros[theirs.removesuffix("weight") + "bias"] = np.zeros(model.named_parameters()[ours].shape[0], np.float32)
    return tensors | zeros


GGUF_CONFIG = {
    "context_length": "context",
    "embedding_length": "d_model",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "feed_forward_length": "d_ff",
    "attention.layer_norm_epsilon": "eps",
}
GGUF_NAMES = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "blocks.{}.attention_norm": "blk.{}.attn_norm",
    "blocks.{}.attention.qkv": "blk.{}.attn_qkv",
    "blocks.{}.attention.out": "blk.{}.attn_output",
    "blocks.{}.mlp_norm": "blk.{}.ffn_norm",
    "blocks.{}.mlp.up": "blk.{}.ffn_up",
    "blocks.{}.mlp.down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
