"""Activation checkpointing: a block keeps its input alone, and its activations are computed again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. Costs one more forward pass of the blocks, a third of a step's products at most; the loss and all
gradients keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from fastlm.backend import Array
from fastlm.nn.module import Module
from fastlm.tensor import Tensor, enable_grad, needs_grad, record, recording

M = TypeVar("M", bound=Module)


def recompute(model: M, on: bool = True) -> M:
    """Every block of the model (the elements of its lists `blocks`) forgets its activations, or, with on=False, keeps them again.

    Parameters, their names and all results stay as they are. Returns the model. ValueError for a model without blocks, and for one
    whose blocks cannot be computed again one by one.
    """
    for part in check_recompute(model) if on else list(_stacks(model)):
        plain = [b.block if isinstance(b, Recomputed) else b for b in part.__dict__["blocks"]]
        part.__dict__["blocks"] = [Recomputed(b) for b in plain] if on else plain
    return model


def check_recompute(model: Module) -> list[Module]:
    """The parts whose blocks `recompute` takes; ValueError where it cannot."""
    found = list(_stacks(model))
    if not found:
        raise ValueError(f"[recompute] model must have blocks, {type(model).__name__} has none.")
    for tied, ties in _tied(model):
        raise ValueError(
            f"[recompute] model must have blocks that stand alone, those of {tied} do not: {ties}. Train it without recompute."
        )
    return found


def _tied(module: Module) -> Iterator[tuple[str, str]]:
    """The models in a module whose blocks hang together, and by what."""
    if module.ties:
        yield type(module).__name__, module.ties
    for _, part in module.parts():
        if isinstance(part, Module):
            yield from _tied(part)


def _stacks(module: Module) -> Iterator[Module]:
    """The module and all its parts that have a list `blocks`."""
    if isinstance(module.__dict__.get("blocks"), list):
        yield module
    for _, part in module.parts():
        if isinstance(part, Module):
            yield from _stacks(part)


class Recomputed(Module):
    """A block, called as block(x, context, ...) -> y, that keeps x and not what it computes on the way to y."""

    def __init__(self, block: Module) -> None:
        self.block = block

    def parts(self) -> Iterator[tuple[str, Tensor | Module]]:
        return self.block.parts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __call__(self, x: Any, context: Any, *rest: Any, **more: Any) -> Any:
        block = self.block
        if not recording(x, *block.named_parameters().values()):
            return block(x, context, *rest, **more)
        if not isinstance(x, Tensor):
            raise ValueError(f"[recompute] a block must map one Tensor to one, {type(block).__name__} gets {type(x).__name__}.")
        if context.memory is not None or needs_grad(context.bias):
            raise ValueError(
                "[recompute] blocks must share nothing that has a gradient: no memory of an encoder, no position bias."
            )
        xd, routings = x.data, len(context.routings)

        def run() -> tuple[Tensor, Tensor]:
            # The input is a node, not a leaf, so that its gradients are added up as they are without recomputation.
            leaf = Tensor(xd, requires_grad=True)
            return leaf, block(record(xd, (leaf,), lambda dy: (dy,)), context, *rest, **more)

        y = run()[1].data  # recorded, so that every kernel is the one that runs again; forgotten here
        if len(context.routings) != routings:
            raise ValueError("[recompute] blocks must have no experts: what their routers chose is part of the loss.")

        def backward(dy: Array) -> Sequence[Array | None]:
            with enable_grad():
                leaf, again = run()
            again.backward(dy)
            return (leaf.grad,)

        return record(y, (x,), backward)
