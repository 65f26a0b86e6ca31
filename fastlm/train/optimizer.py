"""AdamW over a model's parameters. Loshchilov and Hutter 2019, arXiv:1711.05101."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.nn import Module
from fastlm.tensor import Tensor


class AdamW:
    """Matrices decay, vectors (norms, biases) do not. `m`, `v`: the moments by parameter name; `updates`: how many were made."""

    def __init__(self, model: Module, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.parameters: dict[str, Tensor] = {k: p for k, p in model.named_parameters().items() if p.requires_grad}
        self.betas, self.eps = betas, eps
        self.decays = [weight_decay if p.ndim >= 2 else 0.0 for p in self.parameters.values()]
        self.m = {k: backend.zeros(p.shape) for k, p in self.parameters.items()}
        self.v = {k: backend.zeros(p.shape) for k, p in self.parameters.items()}
        self.updates = 0

    def update(self, lr: float, clip: float | None) -> float:
        """One step in place; returns the gradients' norm before clipping. A norm that is not finite changes nothing."""
        gradients = [p.grad_buffer() for p in self.parameters.values()]
        norm = float(ops.global_norm(gradients))
        if not math.isfinite(norm):
            return norm
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self.updates += 1
        beta1, beta2 = self.betas
        ops.adamw_step(
            list(self.parameters.values()), gradients, list(self.m.values()), list(self.v.values()),
            step=self.updates, lr=lr, beta1=beta1, beta2=beta2, eps=self.eps, weight_decay=self.decays, scale=scale,
        )  # fmt: skip
        return norm

    def zero_grad(self) -> None:
        """Drops the gradients; what is computed next has their memory."""
        for p in self.parameters.values():
            p.grad = None

    def state(self) -> dict[str, Array]:
        """The moments as `m.<name>` and `v.<name>`."""
        return {f"m.{k}": a for k, a in self.m.items()} | {f"v.{k}": a for k, a in self.v.items()}

    def restore(self, state: Mapping[str, Array], updates: int) -> None:
        """Takes over what `state` gave. ValueError where names or shapes differ."""
        expected = self.state()
        if state.keys() != expected.keys() or any(state[k].shape != a.shape for k, a in expected.items()):
            raise ValueError("[resume] the optimiser's state does not fit the model: its names or shapes differ.")
        for key, array in expected.items():
            np.copyto(array, state[key])
        self.updates = updates
