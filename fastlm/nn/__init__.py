"""Parts of models. They take numbers and objects, never a config; the wiring is in fastlm/models."""

from fastlm.nn.attention import CAUSAL, EVERYTHING, Attention, CrossAttention, FusedAttention, Sees
from fastlm.nn.cache import Cache, Context, cache_dtype
from fastlm.nn.linear import Embedding, Linear, make_fast
from fastlm.nn.memory import Memory, Padding
from fastlm.nn.mlp import MLP, GatedMLP
from fastlm.nn.module import Declared, Module, count_parameters, initialise, parameter
from fastlm.nn.moe import MoE
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.recompute import check_recompute, recompute
from fastlm.nn.rope import Rope, rope_scaling

__all__ = [
    "CAUSAL",
    "EVERYTHING",
    "MLP",
    "Attention",
    "Cache",
    "Context",
    "CrossAttention",
    "Declared",
    "Embedding",
    "FusedAttention",
    "GatedMLP",
    "LayerNorm",
    "Linear",
    "Memory",
    "MoE",
    "Module",
    "Padding",
    "RMSNorm",
    "Rope",
    "Sees",
    "cache_dtype",
    "check_recompute",
    "count_parameters",
    "initialise",
    "make_fast",
    "parameter",
    "recompute",
    "rope_scaling",
]
