"""LLaMA 1, 2, 3 and what shares its wiring (SmolLM2, TinyLlama, ...). Touvron et al. 2023, arXiv:2302.13971.

RMS norm before each part, rotary positions (half-split), grouped key/value heads, SwiGLU, no biases unless the config says so.

    ids -> embedding -> [ x += attention(norm(x)); x += gated_mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm.backend import Array
from fastlm.checkpoint import QuantizedArray
from fastlm.models.base import CausalLM, check_config
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Linear, Module, RMSNorm, Rope, rope_scaling


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 32000
    context: int = 2048
    d_model: int = 4096
    d_ff: int = 11008
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    head_dim: int = 128
    eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # in the form of Hugging Face, without the base
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


def _three(d_model: int, d_ff: int, n_layer: int, n_head: int, **more: Any) -> LlamaConfig:
    """LLaMA 3 and later."""
    head_dim = d_model // n_head
    base = {"vocab_size": 128256, "context": 8192, "n_kv_head": 8, "eps": 1e-5, "rope_base": 5e5} | more
    return LlamaConfig(d_model=d_model, d_ff=d_ff, n_layer=n_layer, n_head=n_head, head_dim=head_dim, **base)


def _scaling(factor: float) -> dict[str, Any]:
    original = {"original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | original


PRESETS = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(d_model=5120, d_ff=13824, n_layer=40, n_head=40, n_kv_head=40),
    "llama-30b": LlamaConfig(d_model=6656, d_ff=17920, n_layer=60, n_head=52, n_kv_head=52),
    "llama-65b": LlamaConfig(d_model=8192, d_ff=22016, n_layer=80, n_head=64, n_kv_head=64),
    "llama-2-7b": LlamaConfig(context=4096, eps=1e-5),
    "llama-2-13b": LlamaConfig(context=4096, d_model=5120, d_ff=13824, n_layer=40, n_head=40, n_kv_head=40, eps=1e-5),
    "llama-2-70b": LlamaConfig(context=4096, d_model=8192, d_ff=28672, n_layer=80, n_head=64, n_kv_head=8, eps=1e-5),
    "llama-3-8b": _three(4096, 14336, 32, 32),
    "llama-3-70b": _three(8192, 28672, 80, 64),
    "llama-3.1-405b": _three(16384, 53248, 126, 128, context=131072, rope_scaling=_scaling(8.0)),
    "llama-3.2-1b": _three(2048, 8192, 16, 32, context=131072, rope_scaling=_scaling(32.0), tied=True),
    "llama-3.2-3b": _three(3072, 8192, 28, 24, context=131072, rope_scaling=_scaling(32.0), tied=True),
}


class Block(Module):
    def __init__(self, c: LlamaConfig, rope: Rope) -> None:
        out_std = 0.02 / math.sqrt(2 * c.n_layer)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.attention = Attention(c.d_model, c.n_head, c.n_kv_head, c.head_dim, c.attention_bias, rope, out_std)
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        self.mlp = GatedMLP(c.d_model, c.d_ff, "silu", c.mlp_bias, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class Llama(CausalLM):
    def __init__(self, config: LlamaConfig) -> None:
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


Config, Model = LlamaConfig, Llama

HF_TYPE, HF_CLASS = "llama", "LlamaForCausalLM"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "rms_norm_eps": "eps",
    "rope_theta": "rope_base",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tied",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"hidden_act": "silu", "rope_interleaved": False}
HF_IGNORED = ("attention_dropout", "pretraining_tp", "is_llama_config", "max_sequence_length")
HF_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
HF_PREFIX = "model."
HF_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what it may leave out put in, and `rope_parameters` (transformers 5) in its older form."""
    raw = dict(raw)
    parameters = raw.pop("rope_parameters", None)
    scaling = raw.get("rope_scaling") or parameters  # as transformers does: where both are there, one of them is not read at all
    if isinstance(scaling, Mapping) and "rope_theta" in scaling:
        scaling = dict(scaling)
        raw["rope_theta"] = scaling.pop("rope_theta")
    if scaling is not None:
        raw["rope_scaling"] = scaling
    if (
        isinstance(raw.get("rope_scaling"), dict)
        and raw["rope_scaling"].get("rope_type", raw["rope_scaling"].get("type")) == "default"
    ):
        raw["rope_scaling"] = None
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads", 32)
    if raw.get("head_dim") is None:
        width, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
        if type(width) is int and type(heads) is int:  # where they are not, the config says so
            raw["head_dim"] = width // max(heads, 1)
    return raw


GGUF_CONFIG = {
    "vocab_size": "vocab_size",
    "context_length": "context",
    "embedding_length": "d_model",
    "feed_forward_length": "d_ff",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_kv_head",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "eps",
    "rope.freq_base": "rope_base",
}
GGUF_NAMES = {
    "token_embedding": "token_embd",
    "blocks.{}.attention_norm": "blk.{}.attn_norm",
    "blocks.{}.attention.q": "blk.{}.attn_q",
    "blocks.{}.attention.k": "blk.{}.attn_k",
    "blocks.{}.attention.v": "blk.{}.attn_v",
    "blocks.{}.attention.out": "blk.{}.attn_output",
    "blocks.{}.mlp_norm": "blk.{}.ffn_norm",
    "blocks.{}.mlp.gate": "blk.{}.ffn_gate",
    "blocks.{}.mlp.up": "blk.{}.ffn_up",
    "blocks.{}.mlp.down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}


def gguf_read(tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Puts the rows of Q and K back from the interleaved order of GGUF's llama files into the half-split one of our RoPE.

    So there is one order in memory, and such a model can be saved as a Hugging Face folder as it is. A row is whole quantised
    blocks, so quantised weights are permuted without decoding; only Q and K are copied out of the mapped file.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
        if match is None:
            continue
        heads = config.n_head if match[1] == "q" else config.n_kv_head
        if heads < 1 or not tensor.shape or tensor.shape[0] % (2 * heads):
            continue  # misshapen: load_tensors says so
        order = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        if isinstance(tensor, QuantizedArray):
            found[name] = QuantizedArray(tensor.kind, tensor.shape, tensor.blocks[order])
        else:
            found[name] = tensor[order]
    return found
