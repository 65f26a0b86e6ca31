"""GPT. Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training".

Learned positions, a norm after each part and none at the end, tied head. Its "gelu" is the tanh form.

    ids -> token + position embedding -> [ x = norm(x + attention(x)); x = norm(x + mlp(x)) ] * n_layer -> logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastlm import ops
from fastlm.backend import Array
from fastlm.models.base import CausalLM, check_config
from fastlm.nn import MLP, Context, Embedding, FusedAttention, LayerNorm, Linear, Module


@dataclass(frozen=True)
class GPT1Config:
    vocab_size: int = 40478
    context: int = 512
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation: str = "gelu_tanh"
    eps: float = 1e-5
    tied: bool = True

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {"gpt1": GPT1Config()}


class Block(Module):
    def __init__(self, c: GPT1Config) -> None:
        self.attention = FusedAttention(c.d_model, c.n_head, bias=True)
        self.attention_norm = LayerNorm(c.d_model, c.eps)
        self.mlp = MLP(c.d_model, 4 * c.d_model, c.activation)
        self.mlp_norm = LayerNorm(c.d_model, c.eps)

    def __call__(self, x: Any, context: Context, layer: int) -> Any:
        x = self.attention_norm(self.attention(x, context, layer, residual=x))
        return self.mlp_norm(self.mlp(x, residual=x))


class GPT1(CausalLM):
    def __init__(self, config: GPT1Config) -> None:
        c = self.config = check_config(config)
        self.token_embedding = Embedding(c.vocab_size, c.d_model)
        self.position_embedding = Embedding(c.context, c.d_model)
        self.blocks = [Block(c) for _ in range(c.n_layer)]
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def hidden(self, ids: Array, context: Context) -> Any:
        if context.end > self.config.context:
            raise ValueError(f"[gpt1] ids must end within the context of {self.config.context} positions, got {context.end}.")
        x = ops.add(self.token_embedding(ids), self.position_embedding(context.places))
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return x


Config, Model = GPT1Config, GPT1

HF_TYPE, HF_CLASS = "openai-gpt", "OpenAIGPTLMHeadModel"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "afn": "activation",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tied",
}
HF_VALUES = {"activation": {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}}
HF_FIXED: dict[str, Any] = {}
# fmt: off
HF_IGNORED = (
    "n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_special", "predict_special_tokens", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)
# fmt: on
HF_NAMES = {
    "token_embedding": "transformer.tokens_embed",
    "position_embedding": "transformer.positions_embed",
    "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
    "head": "lm_head",
}
HF_TRANSPOSED = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")  # Conv1D: (in, out)
HF_IGNORED_TENSORS = (r"(transformer\.)?h\.\d+\.attn\.bias", r"(transformer\.)?position_ids")  # the causal mask, positions
HF_PREFIX = "transformer."
HF_TIED = {"lm_head.weight": "transformer.tokens_embed.weight"}
