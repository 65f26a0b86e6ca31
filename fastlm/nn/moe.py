"""MoE: a feed-forward part of many experts, of which each token uses a few, chosen by a router."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastlm import ops
from fastlm.nn.cache import Context
from fastlm.nn.linear import Linear
from fastlm.nn.mlp import MLP, GatedMLP
from fastlm.nn.module import Module


class MoE(Module):
    """Sum of weight * expert(x) over the k experts that the router chooses, + residual. x (B, T, C) -> (B, T, C).

    experts: MLPs or GatedMLPs without biases, all alike. renormalise: the weights of the chosen add up to one (Mixtral, GShard); else
    they are the probabilities (Switch). capacity_factor: None, or each expert takes at most ceil(capacity_factor * k * T / E) tokens
    of a sequence in training, and the rest pass by (GShard); otherwise nothing is dropped, so that a token's output does not depend
    on its neighbours. capacity: None, or the most tokens of a sequence that an expert takes in any call, the first ones (Switch).
    What was chosen is appended to `context.routings`.
    """

    def __init__(
        self,
        d_model: int,
        experts: Sequence[Module],
        k: int,
        *,
        renormalise: bool = True,
        capacity_factor: float | None = None,
        capacity: int | None = None,
        std: float = 0.02,
    ) -> None:
        if not 1 <= k <= len(experts):
            raise ValueError(f"[moe] a token must use from 1 to {len(experts)} experts, all that there are, got {k}.")
        self.router = Linear(d_model, len(experts), bias=False, std=std)
        self.experts = list(experts)
        self.k, self.renormalise, self.capacity_factor, self.capacity = k, renormalise, capacity_factor, capacity

    def __call__(self, x: Any, context: Context, residual: Any = None) -> Any:
        B, T, C = x.shape
        flat = ops.reshape(x, (B * T, C))
        capacity = self.capacity
        if self.capacity_factor is not None and context.training:
            capacity = math.ceil(self.capacity_factor * self.k * T / len(self.experts))
        routing = ops.route(self.router(flat), self.k, renormalise=self.renormalise, capacity=capacity, groups=B)
        context.routings.append(routing)
        y = self._outputs(ops.dispatch(flat, routing), routing.counts)
        y = ops.combine(y, routing, None if residual is None else ops.reshape(residual, (B * T, C)))
        return ops.reshape(y, (B, T, C))

    def _outputs(self, x: Any, counts: Any) -> Any:
        """Every expert on its own rows of x."""
        first: Any = self.experts[0]
        if isinstance(first, GatedMLP):
            gate = ops.grouped_linear(x, self._weights("gate"), counts)
            h = ops.gated(gate, ops.grouped_linear(x, self._weights("up"), counts), first.activation)
        else:
            assert isinstance(first, MLP)
            h = ops.grouped_linear(x, self._weights("up"), counts, first.activation)
        return ops.grouped_linear(h, self._weights("down"), counts)

    def _weights(self, name: str) -> list[Any]:
        return [getattr(expert, name).weight for expert in self.experts]
