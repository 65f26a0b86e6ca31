"""LayerNorm and RMSNorm over the last axis."""

from __future__ import annotations

from typing import Any

from fastlm import ops
from fastlm.nn.module import Module, parameter


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias. Ba et al. 2016, arXiv:1607.06450."""

    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True) -> None:
        self.weight = parameter(d_model, value=1.0)
        self.bias = parameter(d_model) if bias else None
        self.eps = eps

    def __call__(self, x: Any) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight. Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        self.weight = parameter(d_model, value=1.0)
        self.eps = eps

    def __call__(self, x: Any) -> Any:
        return ops.rms_norm(x, self.weight, self.eps)
