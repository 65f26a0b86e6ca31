"""Fused operations on NumPy arrays and Tensors: each checks its arguments, allocates, calls the kernel, knows its gradient."""

from fastlm.ops.adamw import adamw, adamw_step, global_norm
from fastlm.ops.cross_entropy import cross_entropy, log_softmax
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.shape import add, reshape, scale, split

__all__ = ["adamw", "adamw_step", "add", "cross_entropy", "global_norm", "layer_norm", "log_softmax", "reshape", "scale", "split"]
