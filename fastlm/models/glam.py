"""GLaM. Du et al. 2022, arXiv:2112.06905. A decoder in which every other layer has a mixture of experts for its feed-forward part.

Dense layers are gated (GEGLU), experts are not: only so do the published sizes come out (1,161.8B in all, 96.6B for a token). Two
experts a token with GShard's capacity and dropping in training (Lepikhin et al. 2020, arXiv:2006.16668), a balance loss of weight
0.01 a layer. Every layer has its own relative position bias: a number for each head and distance, in the buckets of T5 (Raffel et al.
2020, arXiv:1910.10683, section 2.1), because the sizes leave no room for Transformer-XL's projections. What the paper does not say is
chosen: RMS norms before each part, gelu in the experts, no biases, tied embeddings.

    ids -> embedding -> [ x += attention(norm(x)) + position bias; x += geglu(norm(x)), in odd layers moe(norm(x)) ] -> norm -> logits
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import Weight, check_config
from fastlm.models.experts import ExpertLM
from fastlm.nn import MLP, Attention, Context, Embedding, GatedMLP, Module, MoE, RMSNorm, parameter


@dataclass(frozen=True)
class GLaMConfig:
    vocab_size: int = 256000
    context: int = 1024
    d_model: int = 768
    d_ff: int = 3072
    n_layer: int = 12
    n_head: int = 12
    head_dim: int = 64
    n_expert: int = 64
    n_expert_used: int = 2
    capacity_factor: float = 1.0  # an expert takes up to this many times its even share of a sequence: 2 T / E in GShard
    balance_weight: Weight = 0.01
    n_bucket: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    @property
    def n_kv_head(self) -> int:
        return self.n_head


def _wide(d_model: int, d_ff: int, n_layer: int, n_head: int, n_expert: int) -> GLaMConfig:
    return GLaMConfig(d_model=d_model, d_ff=d_ff, n_layer=n_layer, n_head=n_head, head_dim=128, n_expert=n_expert)


PRESETS = {
    "glam-0.1b-64e": GLaMConfig(),
    "glam-1.7b-32e": _wide(2048, 8192, 24, 16, 32),
    "glam-1.7b-64e": _wide(2048, 8192, 24, 16, 64),
    "glam-1.7b-128e": _wide(2048, 8192, 24, 16, 128),
    "glam-1.7b-256e": _wide(2048, 8192, 24, 16, 256),
    "glam-8b-64e": _wide(4096, 16384, 32, 32, 64),
    "glam-64b-64e": _wide(8192, 32768, 64, 128, 64),
    "glam-1.2t": _wide(8192, 32768, 64, 128, 64),  # the same by its size
}


class RelativeBias(Module):
    """A learned number for each head and bucket of distances to earlier positions: (1 or B, H, T, S), added to the scores."""

    def __init__(self, n_bucket: int, n_head: int, max_distance: int) -> None:
        if n_bucket < 2 or max_distance <= n_bucket // 2:
            raise ValueError(
                f"[config] n_bucket must be at least 2 and max_distance above n_bucket / 2, got {n_bucket} and {max_distance}."
            )
        self.weight = parameter(n_bucket, n_head, std=0.02)
        self.max_distance = max_distance
        self.buckets = self._buckets(np.arange(max_distance, -1, -1))  # beyond is what max_distance is

    def _buckets(self, distance: Array) -> Array:
        """Half of the buckets are single distances, the others grow by a factor up to max_distance; later positions are in 0."""
        count = self.weight.shape[0]
        exact = count // 2
        far = np.log(np.maximum(distance, 1) / exact) / math.log(self.max_distance / exact) * (count - exact)
        grown = np.minimum(exact + np.maximum(far, 0).astype(np.int32), count - 1)
        return np.where(distance < exact, np.maximum(distance, 0), grown).astype(np.int32)

    def __call__(self, context: Context) -> Any:
        return ops.distance_bias(self.buckets, self.weight, context.queries, context.end, self.max_distance)


class Block(Module):
    def __init__(self, c: GLaMConfig, layer: int) -> None:
        out_std = 0.02 / math.sqrt(2 * c.n_layer)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.position_bias = RelativeBias(c.n_bucket, c.n_head, c.max_distance)
        self.attention = Attention(c.d_model, c.n_head, c.n_head, c.head_dim, False, None, out_std)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        if layer % 2:
            experts = [MLP(c.d_model, c.d_ff, "gelu", False, out_std) for _ in range(c.n_expert)]
            self.moe: MoE | None = MoE(c.d_model, experts, c.n_expert_used, capacity_factor=c.capacity_factor)
        else:
            self.moe = None
            self.mlp = GatedMLP(c.d_model, c.d_ff, "gelu", False, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x, bias=self.position_bias(context))
        normed = self.mlp_norm(x)
        return self.mlp(normed, residual=x) if self.moe is None else self.moe(normed, context, residual=x)


class GLaM(ExpertLM):
    def __init__(self, config: GLaMConfig) -> None:
        c = self.config = check_config(config)
        if c.n_layer < 2:
            raise ValueError(f"[config] n_layer must be at least 2, so that a layer has experts, got {c.n_layer}.")
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.blocks = [Block(c, layer) for layer in range(c.n_layer)]
        self.final_norm = RMSNorm(c.d_model, c.eps)
        self.head = None

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.token_embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)

    def auxiliary_loss(self, context: Context) -> Any:
        """The mean over layers of each layer's own loss: together, the imbalance of one could hide that of another."""
        total = ops.switch_load_balancing_loss(context.routings[:1])
        for routing in context.routings[1:]:
            total = ops.add(total, ops.switch_load_balancing_loss([routing]))
        return ops.scale(total, self.config.balance_weight / len(context.routings))


Config, Model = GLaMConfig, GLaM

# transformers has no such class: the type and the names are our own.
HF_TYPE, HF_CLASS = "fastlm-glam", "GLaMForCausalLM"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "head_dim": "head_dim",
    "num_local_experts": "n_expert",
    "num_experts_per_tok": "n_expert_used",
    "expert_capacity_factor": "capacity_factor",
    "router_aux_loss_coef": "balance_weight",
    "relative_attention_num_buckets": "n_bucket",
    "relative_attention_max_distance": "max_distance",
    "rms_norm_eps": "eps",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"hidden_act": "gelu", "tie_word_embeddings": True}
HF_IGNORED = ()
HF_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.position_bias": "model.layers.{}.self_attn.relative_attention_bias",
    "blocks.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "blocks.{}.moe.router": "model.layers.{}.block_sparse_moe.gate",
    "blocks.{}.moe.experts.{}.up": "model.layers.{}.block_sparse_moe.experts.{}.up_proj",
    "blocks.{}.moe.experts.{}.down": "model.layers.{}.block_sparse_moe.experts.{}.down_proj",
    "final_norm": "model.norm",
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS: tuple[str, ...] = ()
HF_PREFIX = "model."
