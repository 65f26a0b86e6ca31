"""Qwen2 and Qwen2.5. Yang et al. 2024, arXiv:2407.10671. LLaMA's block with biases on queries, keys and values alone.

ids -> embedding -> [ x += attention(norm(x)); x += gated_mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm.backend import Array
from fastlm.models import llama
from fastlm.models.base import CausalLM, Id, check_config
from fastlm.nn import Attention, Context, Embedding, GatedMLP, Linear, Module, RMSNorm, Rope, Sees, rope_scaling


@dataclass(frozen=True)
class Qwen2Config:
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


def _preset(d_model: int, d_ff: int, n_layer: int, n_head: int, n_kv_head: int, **more: Any) -> Qwen2Config:
    sizes = {"d_model": d_model, "d_ff": d_ff, "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head}
    return Qwen2Config(**sizes | {"head_dim": d_model // n_head, "window": None, "rope_base": 1e6} | more)


PRESETS = {
    "qwen2.5-0.5b": _preset(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _preset(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _preset(2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _preset(3584, 18944, 28, 28, 4, vocab_size=152064, context=131072),
}


def sees(c: Any, layer: int) -> Sees:
    """What a layer sees: everything before it, or only the last `window` keys from layer `full_layers` on."""
    return Sees(True, c.window if c.windowed and layer >= c.full_layers else None)


class Block(Module):
    def __init__(self, c: Qwen2Config, rope: Rope, sees: Sees) -> None:
        out_std = 0.02 / math.sqrt(2 * c.n_layer)
        self.attention_norm = RMSNorm(c.d_model, c.eps)
        self.attention = Attention(
            c.d_model, c.n_head, c.n_kv_head, c.head_dim, True, rope, out_std, sees=sees, out_bias=False
        )  # fmt: skip
        self.mlp_norm = RMSNorm(c.d_model, c.eps)
        self.mlp = GatedMLP(c.d_model, c.d_ff, "silu", False, out_std)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention(self.attention_norm(x), context, layer, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class Qwen2(CausalLM):
    def __init__(self, config: Qwen2Config) -> None:
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


Config, Model = Qwen2Config, Qwen2

HF_TYPE, HF_CLASS = "qwen2", "Qwen2ForCausalLM"
HF_CONFIG = {k: v for k, v in llama.HF_CONFIG.items() if not k.endswith("bias")} | {
    "use_sliding_window": "windowed",
    "sliding_window": "window",
    "max_window_layers": "full_layers",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"hidden_act": "silu"}
HF_IGNORED = ("attention_dropout",)
HF_NAMES = llama.HF_NAMES
HF_TRANSPOSED: tuple[str, ...] = ()
HF_IGNORED_TENSORS = llama.HF_IGNORED_TENSORS
HF_PREFIX = llama.HF_PREFIX
HF_TIED = llama.HF_TIED


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """As LLaMA's. `layer_types` repeats what the three keys of the window say, and must agree with them."""
    raw = llama.hf_defaults({"num_key_value_heads": 32} | raw)
    types = raw.pop("layer_types", None)
    if types is not None and not isinstance(types, list):
        raise ValueError(f"config.json: layer_types must be a list, got {types!r:.60}.")
    first = raw.get("max_window_layers", 28)
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    for layer, kind in enumerate(types or ()):
        expected = "sliding_attention" if window is not None and layer >= first else "full_attention"
        if kind != expected:
            raise ValueError(
                f"config.json: layer_types[{layer}] must be {expected!r}, as max_window_layers says, got {kind!r:.60}."
            )
    return raw


GGUF_CONFIG, GGUF_NAMES = llama.GGUF_CONFIG, llama.GGUF_NAMES  # without LLaMA's order of the rows of Q and K
