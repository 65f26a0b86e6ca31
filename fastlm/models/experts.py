"""What models with experts share: their auxiliary loss, what their experts were given, and the parameters that a token uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import backend, ops
from fastlm.backend import Array
from fastlm.models.base import CausalLM, LanguageModel, as_ids
from fastlm.nn import Context, Module, MoE, count_parameters
from fastlm.tensor import Tensor


class WithExperts(LanguageModel):
    """A model with MoE parts: its `loss` calls `count_experts`."""

    ties = "what their experts' routers chose is part of the loss"

    # Each layer's counts. On a device they stay there: reading them would keep a step from being recorded.
    _taken: Sequence[Array] = ()
    _choices: int = 0

    def count_experts(self, routings: Sequence[ops.Routing]) -> None:
        """What `expert_counts` and `dropped` are about from now on."""
        self._taken, self._choices = tuple(r.counts for r in routings), sum(r.experts.size for r in routings)

    @property
    def expert_counts(self) -> Array | None:
        """(layers with experts, E) int64: tokens that each expert took in the last loss. Waits for a device."""
        return np.stack([backend.host(n) for n in self._taken]) if self._taken else None

    @property
    def dropped(self) -> int:
        """Choices that found their expert full in the last loss."""
        return self._choices - int(sum(backend.host(n).sum() for n in self._taken))

    def active_parameters(self) -> int:
        """The parameters that one token uses: all but the experts that it is not sent to."""
        idle = sum((len(m.experts) - m.k) * count_parameters(m.experts[0]) for m in _mixtures(self))
        return count_parameters(self) - idle


class ExpertLM(WithExperts, CausalLM):
    """A CausalLM with MoE parts. A subclass defines `auxiliary_loss`."""

    def auxiliary_loss(self, context: Context) -> Any:
        """What `loss` adds to the cross-entropy, a scalar; None for nothing."""
        raise NotImplementedError(f"{type(self).__name__} defines no auxiliary_loss")

    def loss(self, ids: Any, targets: Any, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy of the next token and the auxiliary loss, a scalar. Then `expert_counts` and `dropped` are its.

        Tokens whose targets are left out count among those of the auxiliary loss, padding too, as in the reference without an
        attention mask."""
        ids = as_ids("ids", ids)
        targets = as_ids("targets", targets, ids.shape)
        context = Context(*ids.shape, device=self.device)
        context.training = True
        x = self.hidden(ids, context)
        self.count_experts(context.routings)
        flat = ops.reshape(x, (-1, x.shape[-1]))
        loss: Tensor = ops.linear_cross_entropy(flat, self._head_weight(), targets.reshape(-1), ignore_index)
        extra = self.auxiliary_loss(context)
        return loss if extra is None else ops.add(loss, extra)


def _mixtures(module: Module) -> list[MoE]:
    found = [module] if isinstance(module, MoE) else []
    for _, part in module.parts():
        if isinstance(part, Module):
            found += _mixtures(part)
    return found
