"""The feed-forward parts: MLP (one activation) and GatedMLP (a gate beside it)."""

from __future__ import annotations

from typing import Any

from fastlm import ops
from fastlm.nn.linear import Linear
from fastlm.nn.module import Module


class MLP(Module):
    """down(act(up(x))) + residual. Activation: "gelu", "gelu_tanh", "silu" or "relu"."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "gelu_tanh", bias: bool = True, out_std: float = 0.02) -> None:
        self.up = Linear(d_model, d_ff, bias)
        self.down = Linear(d_ff, d_model, bias, std=out_std)
        self.activation = activation

    def __call__(self, x: Any, residual: Any = None) -> Any:
        return self.down(self.up(x, activation=self.activation), residual=residual)


class GatedMLP(Module):
    """down(act(gate(x)) * up(x)) + residual. Shazeer 2020, arXiv:2002.05202."""

    one_input = ("gate", "up")

    def __init__(self, d_model: int, d_ff: int, activation: str = "silu", bias: bool = False, out_std: float = 0.02) -> None:
        self.gate = Linear(d_model, d_ff, bias)
        self.up = Linear(d_model, d_ff, bias)
        self.down = Linear(d_ff, d_model, bias, std=out_std)
        self.activation = activation

    def __call__(self, x: Any, residual: Any = None) -> Any:
        biases = (self.gate.bias, self.up.bias)
        y = ops.gated_linears(x, self.gate.weight, self.up.weight, self.activation, biases)
        return self.down(y, residual=residual)
