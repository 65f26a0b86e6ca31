"""PaLM. Chowdhery et al. 2022, arXiv:2204.02311, section 2. Attention and MLP side by side on one norm, one key/value head, SwiGLU,
rotary positions, no biases, head tied, logits times 1 / sqrt(d_model), embeddings drawn from N(0, 1).

What the paper leaves open: which pairs of dimensions rotary positions turn (here a head's two halves, as in LLaMA), and whether the
norms have scales (here none: its 540.35 billion parameters are exactly the matrices; scales would make 540.36). Its auxiliary loss,
1e-4 log^2 Z, is not part of `loss`.

    ids -> embedding -> [ h = norm(x); x += attention(h) + gated_mlp(h) ] * n_layer -> norm -> logits / sqrt(d)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import CausalLM, check_config
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Module, Rope


@dataclass(frozen=True)
class PaLMConfig:
    vocab_size: int = 256000
    context: int = 2048
    d_model: int = 18432
    n_layer: int = 118
    n_head: int = 48
    head_dim: int = 256  # free of d_model: 48 x 256 = 12288 at 540B
    d_ff: int | None = None  # None: 4 d_model
    eps: float = 1e-6
    rope_base: float = 10000.0

    @property
    def n_kv_head(self) -> int:
        return 1


PRESETS = {
    "palm-8b": PaLMConfig(d_model=4096, n_layer=32, n_head=16),
    "palm-62b": PaLMConfig(d_model=8192, n_layer=64, n_head=32),
    "palm-540b": PaLMConfig(),
}


class PlainNorm(Module):
    """(x - mean) / sqrt(variance + eps): a layer norm with nothing to learn."""

    def __init__(self, d_model: int, eps: float) -> None:
        self.ones, self.eps = np.ones(d_model, np.float32), eps

    def __call__(self, x: Any) -> Any:
        return ops.layer_norm(x, self.ones, None, self.eps)


class Block(Module):
    def __init__(self, c: PaLMConfig, rope: Rope) -> None:
        std = c.d_model**-0.5  # 1 / sqrt(fan-in)
        self.norm = PlainNorm(c.d_model, c.eps)
        self.attention = Attention(
            c.d_model, c.n_head, 1, c.head_dim, False, rope, out_std=(c.n_head * c.head_dim) ** -0.5, std=std
        )  # fmt: skip
        self.mlp = GatedMLP(c.d_model, c.d_ff or 4 * c.d_model, "silu", False, out_std=(c.d_ff or 4 * c.d_model) ** -0.5)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        h = self.norm(x)
        return self.mlp(context.asked(h, layer), residual=self.attention(h, context, layer, residual=x))


class PaLM(CausalLM):
    def __init__(self, config: PaLMConfig) -> None:
        c = self.config = check_config(config)
        rope = Rope(c.head_dim, c.rope_base)
        self.token_embedding = Embedding(c.vocab_size, c.d_model, std=1.0)
        self.blocks = [Block(c, rope) for _ in range(c.n_layer)]
        self.final_norm = PlainNorm(c.d_model, c.eps)
        self.head = None

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.token_embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return ops.scale(self.final_norm(x), self.config.d_model**-0.5)  # what scales the logits, on the narrower side


Config, Model = PaLMConfig, PaLM

# transformers has no such class, and Google published no weights: type and names are our own.
HF_TYPE, HF_CLASS = "fastlm-palm", "PaLMForCausalLM"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "layer_norm_eps": "eps",
    "rope_theta": "rope_base",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"tie_word_embeddings": True}
HF_IGNORED = ()
HF_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks.{}.attention.q": "model.layers.{}.attention.q_proj",
    "blocks.{}.attention.k": "model.layers.{}.attention.k_proj",
    "blocks.{}.attention.v": "model.layers.{}.attention.v_proj",
    "blocks.{}.attention.out": "model.layers.{}.attention.o_proj",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS: tuple[str, ...] = ()
HF_PREFIX = "model."
