"""Megatron-Turing NLG 530B. Smith et al. 2022, arXiv:2201.11990. The wiring of GPT-2 at a size that 35 x 8 GPUs hold, its weights
drawn with std 4e-3, times 1 / sqrt(2 L) into the residual stream.

    ids -> token + position embedding -> [ x += attention(norm(x)); x += mlp(norm(x)) ] * n_layer -> norm -> logits
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastlm.models import gpt
from fastlm.models.base import check_config
from fastlm.models.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class MegatronConfig:
    vocab_size: int = 50257
    context: int = 2048
    d_model: int = 20480
    n_layer: int = 105
    n_head: int = 128
    eps: float = 1e-5
    init_std: float = 4e-3

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head


PRESETS = {"megatron-turing-530b": MegatronConfig()}


class Megatron(GPT):
    def __init__(self, config: MegatronConfig) -> None:
        c = check_config(config)
        super().__init__(GPTConfig(c.vocab_size, c.context, c.d_model, c.n_layer, c.n_head, eps=c.eps))
        self.config: Any = c
        for p in self.named_parameters().values():  # GPT-2 declares its matrices with std 0.02
            p.data = replace(p.data, std=p.data.std * c.init_std / 0.02)


Config, Model = MegatronConfig, Megatron

# transformers has no class of its own for it: the type is ours, the names are GPT-2's.
HF_TYPE, HF_CLASS = "fastlm-megatron", "MegatronLMHeadModel"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "layer_norm_epsilon": "eps",
    "init_std": "init_std",
}
HF_VALUES: dict[str, dict[str, Any]] = {}
HF_FIXED = {"activation_function": "gelu_new", "tie_word_embeddings": True}
HF_IGNORED = ()
HF_NAMES = gpt.HF_NAMES
HF_TRANSPOSED = gpt.HF_TRANSPOSED
HF_IGNORED_TENSORS = gpt.HF_IGNORED_TENSORS
HF_PREFIX = gpt.HF_PREFIX
HF_TIED = gpt.HF_TIED
