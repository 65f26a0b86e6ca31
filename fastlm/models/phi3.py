"""Phi-3 and Phi-4. Abdin et al. 2024, arXiv:2404.14219. LLaMA's block with one matrix for queries, keys and values and one for
gate and up, a window, and positions on the first part of a head only where `rotary` is below 1.

    ids -> embedding -> [ x += attention(norm(x)); x += gated_mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm import ops
from fastlm.backend import Array
from fastlm.models import llama
from fastlm.models.base import CausalLM, Id, check_config
from fastlm.nn import Context, Embedding, FusedAttention, Linear, Module, RMSNorm, Rope, Sees, rope_scaling
from fastlm.nn.rope import FactorScaling, Scaling, Unscaled


@dataclass(frozen=True)
class Phi3Config:
    vocab_size: int = 32064
    context: int = 4096
    d_model: int = 3072
    d_ff: int = 8192
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    window: int | None = None
    rotary: float = 1.0  # the share of a head's dimensions that positions turn
    eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False
    pad: Id | None = None  # no effect here; transformers' default is beyond a small vocabulary

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {
    "phi-3-mini": Phi3Config(window=2047, pad=32000),
    "phi-3-medium": Phi3Config(d_model=5120, d_ff=17920, n_layer=40, n_head=40, n_kv_head=10, window=2047, pad=32000),
    "phi-4": Phi3Config(
        vocab_size=100352, context=16384, d_model=5120, d_ff=17920, n_layer=40, n_head=40, n_kv_head=10, rope_base=250000.0
    ),
}


def _scaling(c: Phi3Config) -> Scaling:
    """None but the factors of a GGUF file: the reference knows Phi-3's own 'longrope' alone, and takes 'yarn' for it."""
    scaling = rope_scaling(c.rope_scaling, c.context)
    if not isinstance(scaling, (Unscaled, FactorScaling)):
        kind = (c.rope_scaling or {}).get("rope_type", (c.rope_scaling or {}).get("type"))
        raise ValueError(
            f"[config] rope_scaling of Phi-3 must be None: the reference has no {kind!r} for it, and fastlm no 'longrope'."
        )
    return scaling


class FusedGatedMLP(Module):
    """down(silu(gate) * up) + residual, gate and up from one matrix, stacked in that order."""

    def __init__(self, d_model: int, d_ff: int, out_std: float) -> None:
        self.gate_up = Linear(d_model, 2 * d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False, std=out_std)
        self.d_ff = d_ff

    def __call__(self, x: Any, residual: Any = None) -> Any:
        gate, up = ops.split(self.gate_up(x), (self.d_ff, self.d_ff))
        return self.down(ops.gated(gate, up, "silu"), residual=residual)


class Block(Module):
    def __init__(self, c: Phi3Config, rope: Rope) -> None:
        out_std, sees = 0.02 / math.sqrt(2 * c.n_layer), Sees(True, c.window)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.attention = FusedAttention(c.d_model, c.n_head, c.n_kv_head, None, False, rope, out_std, sees=sees)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        self.mlp = FusedGatedMLP(c.d_model, c.d_ff, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class Phi3(CausalLM):
    def __init__(self, config: Phi3Config) -> None:
        c = self.config = check_config(config)
        turned = int(c.head_dim * c.rotary)
        if c.rotary > 1 or not 0 < turned + turned % 2 <= c.head_dim:
            raise ValueError(
                f"[config] rotary (partial_rotary_factor) must be at most 1, the whole head, and turn from 1 to {c.head_dim // 2 * 2} of "
                f"its {c.head_dim} dimensions, got {c.rotary}, which is {turned}."
            )
        rope = Rope(c.head_dim, c.rope_base, _scaling(c), turned)
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.blocks = [Block(c, rope) for _ in range(c.n_layer)]
        self.final_norm = RMSNorm(c.d_model, c.eps)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, ids: Array, context: Context) -> Any:
        x = self.token_embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.final_norm(x)


Config, Model = Phi3Config, Phi3

HF_TYPE, HF_CLASS = "phi3", "Phi3ForCausalLM"
HF_CONFIG = {k: v for k, v in llama.HF_CONFIG.items() if k not in ("head_dim", "attention_bias", "mlp_bias")} | {
    "sliding_window": "window",
    "partial_rotary_factor": "rotary",
    "pad_token_id": "pad",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"hidden_act": "silu", "attention_bias": False}
# The original context matters to the "longrope" scaling alone, which is refused by its name.
HF_IGNORED = ("attention_dropout", "resid_pdrop", "embd_pdrop", "original_max_position_embeddings")
HF_NAMES = {k: v for k, v in llama.HF_NAMES.items() if k.rpartition(".")[2] not in ("q", "k", "v", "gate", "up")} | {
    "blocks.{}.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
    "blocks.{}.mlp.gate_up": "model.layers.{}.mlp.gate_up_proj",
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = llama.HF_IGNORED_TENSORS
HF_PREFIX = llama.HF_PREFIX
HF_TIED = llama.HF_TIED


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """As LLaMA's, with the share of turned dimensions out of its RoPE keys, and no head_dim."""
    raw = dict(raw)
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    if isinstance(parameters := raw.get(key), Mapping) and "partial_rotary_factor" in parameters:
        raw[key] = {k: v for k, v in parameters.items() if k != "partial_rotary_factor"}
        raw["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    raw = llama.hf_defaults(raw)
    raw.pop("head_dim", None)
    return raw


GGUF_CONFIG = {k: v for k, v in llama.GGUF_CONFIG.items() if v != "head_dim"} | {"attention.sliding_window": "window"}
GGUF_NAMES = {k: v for k, v in llama.GGUF_NAMES.items() if k.rpartition(".")[2] not in ("q", "k", "v", "gate", "up")} | {
    "blocks.{}.attention.qkv": "blk.{}.attn_qkv",
    "blocks.{}.mlp.gate_up": "blk.{}.ffn_up",
}
