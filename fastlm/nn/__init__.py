"""Parts of models. They take numbers and objects, never a config; the wiring is in fastlm/models."""

from fastlm.nn.attention import Attention, FusedAttention
from fastlm.nn.cache import Cache, Context
from fastlm.nn.linear import Embedding, Linear
from fastlm.nn.mlp import MLP, GatedMLP
from fastlm.nn.module import Declared, Module, count_parameters, initialise, parameter
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.rope import Rope, rope_scaling

__all__ = [
    "MLP",
    "Attention",
    "Cache",
    "Context",
    "Declared",
    "Embedding",
    "FusedAttention",
    "GatedMLP",
    "LayerNorm",
    "Linear",
    "Module",
    "RMSNorm",
    "Rope",
    "count_parameters",
    "initialise",
    "parameter",
    "rope_scaling",
]
