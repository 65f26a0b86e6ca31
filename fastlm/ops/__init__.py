"""Fused operations on NumPy arrays and Tensors: each checks its arguments, allocates, calls the kernel, knows its gradient."""

from fastlm.ops.activation import activation, tanh
from fastlm.ops.adamw import adamw, adamw_step, clip_scale, global_norm
from fastlm.ops.advance import advance, positions
from fastlm.ops.attention import attention, attention_packed
from fastlm.ops.cache_append import PAGE, SCALE, cache_append
from fastlm.ops.cross_entropy import cross_entropy, log_softmax
from fastlm.ops.distance_bias import distance_bias
from fastlm.ops.distillation import cosine_distance, kl_divergence
from fastlm.ops.embedding import embedding
from fastlm.ops.gated import gated
from fastlm.ops.int8_attention import int8_attention
from fastlm.ops.layer_norm import add_layer_norm, layer_norm
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linears import gated_linears, linears
from fastlm.ops.matmul import matmul
from fastlm.ops.moe import (
    Routing,
    combine,
    dispatch,
    grouped_linear,
    mixtral_load_balancing_loss,
    route,
    router_z_loss,
    switch_load_balancing_loss,
)
from fastlm.ops.regression import binary_cross_entropy, mean_squared_error
from fastlm.ops.rel_shift import rel_shift
from fastlm.ops.rms_norm import add_rms_norm, rms_norm
from fastlm.ops.rope import rope, rope_tables
from fastlm.ops.sample import argmax, sample, top_k
from fastlm.ops.shape import add, add_broadcast, reshape, scale, split

__all__ = [
    "PAGE",
    "SCALE",
    "Routing",
    "activation",
    "adamw",
    "adamw_step",
    "add",
    "add_broadcast",
    "add_layer_norm",
    "add_rms_norm",
    "advance",
    "argmax",
    "attention",
    "attention_packed",
    "binary_cross_entropy",
    "cache_append",
    "clip_scale",
    "combine",
    "cosine_distance",
    "cross_entropy",
    "dispatch",
    "distance_bias",
    "embedding",
    "gated",
    "gated_linears",
    "global_norm",
    "grouped_linear",
    "int8_attention",
    "kl_divergence",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linears",
    "log_softmax",
    "matmul",
    "mean_squared_error",
    "mixtral_load_balancing_loss",
    "positions",
    "rel_shift",
    "reshape",
    "rms_norm",
    "rope",
    "rope_tables",
    "route",
    "router_z_loss",
    "sample",
    "scale",
    "split",
    "switch_load_balancing_loss",
    "tanh",
    "top_k",
]
