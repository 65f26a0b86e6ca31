"""AdamW over a model's parameters. Loshchilov and Hutter 2019, arXiv:1711.05101."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastlm import backend, ops
from fastlm.backend import BFLOAT16, Array
from fastlm.nn import Module
from fastlm.tensor import Tensor


class AdamW:
    """Matrices decay, vectors (norms, biases) do not. `m`, `v`: the moments by parameter name; `updates`: how many were made.

    halve: from then on the model computes with bfloat16 copies of its weights, on a device; the weights themselves are float32 here,
    `masters`, and every update is theirs. `finish` makes them the model's again.
    """

    def __init__(self, model: Module, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.parameters: dict[str, Tensor] = {k: p for k, p in model.named_parameters().items() if p.requires_grad}
        self.betas, self.eps = betas, eps
        self.decays = [weight_decay if p.ndim >= 2 else 0.0 for p in self.parameters.values()]
        self.m = {k: backend.zeros(p.shape, like=p.data) for k, p in self.parameters.items()}
        self.v = {k: backend.zeros(p.shape, like=p.data) for k, p in self.parameters.items()}
        self.updates = 0
        self.masters: dict[str, Any] = {}

    def halve(self) -> None:
        """The model's weights are rounded copies of `masters`, which are what they were."""
        self.masters = {k: p.data for k, p in self.parameters.items()}
        self.refresh()

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

    def update_there(self, loss: Any, step: Any, lr: Any, clip: float) -> Any:
        """`update` on a device, which reads step and lr (1,) when it runs. Where the loss () or the norm is not finite it changes
        nothing. Returns the norm, () there."""
        gradients = [p.grad_buffer() for p in self.parameters.values()]
        norm = ops.add(ops.global_norm(gradients), ops.scale(loss, 0.0))  # nan where the loss is not finite
        beta1, beta2 = self.betas
        weights = self.masters.values() if self.masters else self.parameters.values()
        ops.adamw_step(
            list(weights), gradients, list(self.m.values()), list(self.v.values()),
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=self.eps, weight_decay=self.decays, scale=ops.clip_scale(norm, clip),
            copies=[p.data for p in self.parameters.values()] if self.masters else None,
        )  # fmt: skip
        return norm

    def zero_grad(self) -> None:
        """Drops the gradients; what is computed next has their memory."""
        for p in self.parameters.values():
            p.grad = None

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the model's weights are the float32 ones: to be saved, or to be read from a checkpoint."""
        copies = {k: self.parameters[k].data for k in self.masters}
        for k, master in self.masters.items():
            self.parameters[k].data = master
        try:
            yield
        finally:
            for k, copy in copies.items():
                self.parameters[k].data = copy

    def finish(self) -> None:
        """The float32 weights are the model's."""
        for k, master in self.masters.items():
            self.parameters[k].data = master
        self.masters = {}

    def refresh(self) -> None:
        """The model's weights are the masters', rounded: into the memory that recorded steps know, where there is some."""
        for k, master in self.masters.items():
            p = self.parameters[k]
            rounded = backend.put(backend.host(master).astype(BFLOAT16), master.device)
            if p.data is master:
                p.data = rounded
            else:
                backend.assign(p.data, rounded)

    def state(self) -> dict[str, Array]:
        """The moments as `m.<name>` and `v.<name>`, on the host."""
        found = {f"m.{k}": a for k, a in self.m.items()} | {f"v.{k}": a for k, a in self.v.items()}
        return {k: backend.host(a) for k, a in found.items()}

    def restore(self, state: Mapping[str, Array], updates: int) -> None:
        """Takes over what `state` gave. ValueError where names or shapes differ."""
        expected = {f"m.{k}": a for k, a in self.m.items()} | {f"v.{k}": a for k, a in self.v.items()}
        if state.keys() != expected.keys() or any(state[k].shape != a.shape for k, a in expected.items()):
            raise ValueError("[resume] the optimiser's state does not fit the model: its names or shapes differ.")
        for key, array in expected.items():
            backend.assign(array, backend.put(state[key], backend.device_of(array)))
        self.updates = updates
