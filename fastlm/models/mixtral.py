"""Mixtral. Jiang et al. 2024, arXiv:2401.04088. LLaMA's wiring with a mixture of gated experts for the feed-forward part.

The softmax is over all experts; the weights of the two chosen ones are renormalised. Nothing is dropped.

    ids -> embedding -> [ x += attention(norm(x)); x += moe(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm import ops
from fastlm.backend import Array
from fastlm.checkpoint import QuantizedArray
from fastlm.models import llama
from fastlm.models.base import Weight, check_config
from fastlm.models.experts import ExpertLM
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Linear, Module, MoE, RMSNorm, Rope, Sees, rope_scaling


@dataclass(frozen=True)
class MixtralConfig:
    vocab_size: int = 32000
    context: int = 131072
    d_model: int = 4096
    d_ff: int = 14336
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 8
    head_dim: int = 128
    n_expert: int = 8
    n_expert_used: int = 2
    window: int | None = None
    eps: float = 1e-5
    rope_base: float = 1e6
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False
    balance_loss: bool = False  # whether `loss` adds balance_weight * mixtral_load_balancing_loss
    balance_weight: Weight = 0.001


PRESETS = {
    "mixtral-8x7b": MixtralConfig(context=32768, balance_weight=0.02),
    "mixtral-8x22b": MixtralConfig(
        vocab_size=32768, context=65536, d_model=6144, d_ff=16384, n_layer=56, n_head=48, balance_weight=0.001
    ),
    "gpt4-like": MixtralConfig(
        vocab_size=100277,
        context=8192,
        d_model=10240,
        d_ff=30720,
        n_layer=120,
        n_head=80,
        n_expert=16,
        rope_base=1e4,
        balance_loss=True,
    ),
}
NOTES = {
    "gpt4-like": "a guess, not GPT-4, whose architecture, size, data and training are undisclosed (OpenAI 2023, arXiv:2303.08774, "
    "section 2). Known: a Transformer that predicts the next token, contexts of 8,192 and 32,768, a byte-level BPE of 100,277 ids. "
    "Assumed: rotary positions, grouped heads, SwiGLU, 16 experts of which a token uses 2, and every size",
}


class Block(Module):
    def __init__(self, c: MixtralConfig, rope: Rope) -> None:
        out_std, sees = 0.02 / math.sqrt(2 * c.n_layer), Sees(True, c.window)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.attention = Attention(c.d_model, c.n_head, c.n_kv_head, c.head_dim, False, rope, out_std, sees=sees)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        experts = [GatedMLP(c.d_model, c.d_ff, "silu", False, out_std) for _ in range(c.n_expert)]
        self.moe = MoE(c.d_model, experts, c.n_expert_used)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.moe(self.mlp_norm(x), context, residual=x)


class Mixtral(ExpertLM):
    def __init__(self, config: MixtralConfig) -> None:
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

    def auxiliary_loss(self, context: Context) -> Any:
        if not self.config.balance_loss:
            return None
        return ops.scale(ops.mixtral_load_balancing_loss(context.routings), self.config.balance_weight)


Config, Model = MixtralConfig, Mixtral

HF_TYPE, HF_CLASS = "mixtral", "MixtralForCausalLM"
HF_CONFIG = {k: v for k, v in llama.HF_CONFIG.items() if not k.endswith("bias")} | {
    "sliding_window": "window",
    "num_local_experts": "n_expert",
    "num_experts_per_tok": "n_expert_used",
    "output_router_logits": "balance_loss",
    "router_aux_loss_coef": "balance_weight",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"hidden_act": "silu", "router_jitter_noise": 0.0}
HF_IGNORED = ("attention_dropout",)
_DENSE = {ours: theirs for ours, theirs in llama.HF_NAMES.items() if ".mlp." not in ours}
HF_NAMES = _DENSE | {
    "blocks.{}.moe.router": "model.layers.{}.block_sparse_moe.gate",
    "blocks.{}.moe.experts.{}.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blocks.{}.moe.experts.{}.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "blocks.{}.moe.experts.{}.down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = llama.HF_IGNORED_TENSORS
HF_PREFIX = llama.HF_PREFIX
HF_TIED = llama.HF_TIED
HF_RENAMED = ((r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight"),)


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """As LLaMA's, with Mixtral's own number of key/value heads and base where the keys are absent."""
    raw = dict(raw)
    if "num_experts" in raw:
        raw["num_local_experts"] = raw.pop("num_experts")
    return llama.hf_defaults({"num_key_value_heads": 8} | raw)


def hf_read(tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Stacked experts as single matrices: views of gate_up_proj (E, 2 F, C), gate first, and of down_proj (E, C, F)."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up|down)_proj", name)
        if not match or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        for e in range(tensor.shape[0]):
            part = f"{match[1]}.block_sparse_moe.experts.{e}"
            if match[2] == "down":
                found[f"{part}.w2.weight"] = tensor[e]
            else:
                half = tensor.shape[1] // 2
                found[f"{part}.w1.weight"], found[f"{part}.w3.weight"] = tensor[e, :half], tensor[e, half:]
    return found


GGUF_CONFIG = llama.GGUF_CONFIG | {"expert_count": "n_expert", "expert_used_count": "n_expert_used"}
GGUF_NAMES = {ours: theirs for ours, theirs in llama.GGUF_NAMES.items() if ".mlp." not in ours} | {
    "blocks.{}.moe.router": "blk.{}.ffn_gate_inp",
    "blocks.{}.moe.experts.{}.gate": "blk.{}.ffn_gate.{}",
    "blocks.{}.moe.experts.{}.up": "blk.{}.ffn_up.{}",
    "blocks.{}.moe.experts.{}.down": "blk.{}.ffn_down.{}",
}


def gguf_read(tensors: Mapping[str, Any], config: MixtralConfig) -> dict[str, Any]:
    """As LLaMA's, and the stacked experts (E, out, in) as the single matrices that older files have; quantised ones stay so."""
    found: dict[str, Any] = {}
    for name, tensor in llama.gguf_read(tensors, config).items():
        match = re.fullmatch(r"(blk\.\d+\.ffn_(gate|up|down))_exps\.weight", name)
        if not match or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        for e in range(tensor.shape[0]):
            found[f"{match[1]}.{e}.weight"] = _matrix(tensor, e)
    return found


def _matrix(stack: Any, e: int) -> Any:
    if not isinstance(stack, QuantizedArray):
        return stack[e]
    rows = stack.shape[1]
    return QuantizedArray(stack.kind, stack.shape[1:], stack.blocks[e * rows : (e + 1) * rows])
