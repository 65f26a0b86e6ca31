"""Module: parameters by name, in the order in which `__init__` assigns them. Nothing else is automatic.

A parameter is first only declared: its Tensor holds a `Declared` shape in place of an array. So a model of any size can be built,
counted and checked against a file for nothing; `initialise` or `fastlm.models.load_tensors` puts the arrays in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastlm import backend
from fastlm.ops import check
from fastlm.tensor import Tensor

Self = TypeVar("Self", bound="Module")


@dataclass(frozen=True)
class Declared:
    """A parameter that has a shape and a distribution, value + std * N(0, 1), and no memory yet."""

    shape: tuple[int, ...]
    std: float = 0.0
    value: float = 0.0

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def parameter(*shape: int, std: float = 0.0, value: float = 0.0) -> Tensor:
    """A declared float32 parameter that wants a gradient."""
    return Tensor(Declared(shape, std, value), requires_grad=True)


class Module:
    """A part of a model. Attributes that are Tensors are parameters; Modules and lists of Modules are parts with their own."""

    one_input: tuple[str, ...] = ()  # Linear parts that read the same x: as Q8_ROW they have the last one's columns
    ties = ""  # what ties a model's blocks together, so that none can be computed again by itself: see nn.recompute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def parts(self) -> Iterator[tuple[str, Tensor | Module]]:
        """Parameters and parts by name, in the order of assignment; element 3 of the list `blocks` is `blocks.3`."""
        for name, value in self.__dict__.items():
            if isinstance(value, (Tensor, Module)):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", part) for i, part in enumerate(value) if isinstance(part, (Tensor, Module)))

    def named_parameters(self, prefix: str = "") -> dict[str, Tensor]:
        """Every parameter by its dotted name, in the order of definition."""
        found: dict[str, Tensor] = {}
        for name, value in self.parts():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            else:
                found |= value.named_parameters(f"{prefix}{name}.")
        return found

    @property
    def device(self) -> Any:
        """Where the parameters are: None for the host. Asked in every step, so only the first is looked for."""
        first = self._first_parameter()
        return None if first is None else backend.device_of(first.data)

    def _first_parameter(self) -> Tensor | None:
        for _, part in self.parts():
            found = part if isinstance(part, Tensor) else part._first_parameter()
            if found is not None:
                return found
        return None

    def arrays(self) -> Iterator[tuple[Module, str]]:
        """The arrays beside the parameters, constants of the parts: (part, attribute)."""
        for name, value in self.__dict__.items():
            if isinstance(value, np.ndarray) or backend.on_device(value):
                yield self, name
        for _, part in self.parts():
            if isinstance(part, Module):
                yield from part.arrays()

    def train(self: Self) -> Self:
        """Every float32 parameter wants a gradient and has memory of its own; raises TypeError where a weight has another dtype."""
        for name, p in self.named_parameters().items():
            if p.dtype != np.float32:
                raise TypeError(f"[train] {name} is {p.dtype}; training needs float32. Load the model with dtype='float32'.")
            if isinstance(p.data, np.ndarray) and not p.data.flags.writeable:
                p.data = p.data.copy()  # a view of the checkpoint's file
            p.requires_grad = True
        return self

    def freeze(self: Self) -> Self:
        """No parameter wants a gradient; gradients are dropped."""
        for p in self.named_parameters().values():
            p.requires_grad, p.grad = False, None
        return self

    def zero_grad(self) -> None:
        """Drops the gradients: the next backward pass assigns, and until then other arrays have their memory."""
        for p in self.named_parameters().values():
            p.grad = None


def count_parameters(module: Module) -> int:
    """The number of parameters, declared or allocated. A tied matrix counts once."""
    return sum(p.size for p in module.named_parameters().values())


def initialise(module: Module, seed: int = 0) -> None:
    """Allocates and draws every declared parameter. Parameter number i has the Philox stream with the key (seed, i), so its
    values depend on the seed and on its place alone."""
    check.philox("create", seed, 0)  # also where nothing is drawn
    for i, p in enumerate(module.named_parameters().values()):
        spec = p.data
        if not isinstance(spec, Declared):
            continue
        array = backend.empty(spec.shape)
        if spec.std:
            check.philox("create", seed, i).standard_normal(out=array, dtype=np.float32)
            array *= np.float32(spec.std)
            array += np.float32(spec.value)
        else:
            array.fill(spec.value)
        p.data = array
