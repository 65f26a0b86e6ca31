"""Tensor and the tape: define-by-run reverse-mode differentiation over fused operations.

An operation computes with NumPy arrays and, where a gradient will be asked for, calls `record` with a function that maps the
output's gradient to its inputs' gradients. `Tensor.backward` runs these functions in reverse order of recording. Parameter gradients
are accumulated in place (`grad_buffer`), activation gradients are handed on and dropped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array

Backward = Callable[[Array], Sequence[Array | None]]


class _State(threading.local):
    enabled = True
    counter = 0


_state = _State()


class _Node:
    __slots__ = ("backward", "order", "parents")

    def __init__(self, parents: tuple[Tensor | None, ...], backward: Backward, order: int) -> None:
        self.parents = parents
        self.backward = backward
        self.order = order


class Tensor:
    """An array and its place on the tape.

    `data` is a NumPy array. A tensor made by the user with `requires_grad` is a leaf: `backward` adds to its `grad`, which has the
    shape of `data` and is float32.
    """

    __slots__ = ("__weakref__", "_node", "data", "grad", "requires_grad")

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data: Any = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: _Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        return len(self.data.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.data.dtype
        return dtype

    @property
    def size(self) -> int:
        return int(self.data.size)

    def numpy(self) -> Array:
        """The array itself, not a copy."""
        array: Array = self.data
        return array

    def item(self) -> float:
        return float(self.data.item())

    def __repr__(self) -> str:
        kind = "leaf" if self._node is None else "recorded"
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, {kind}{', requires_grad' if self.requires_grad else ''})"

    def __len__(self) -> int:
        return int(self.data.shape[0])

    def grad_buffer(self) -> Array:
        """`grad`, made of zeros where there is none: what a kernel adds a parameter's gradient to."""
        if self.grad is None:
            self.grad = backend.zeros(self.shape)
        return self.grad

    def backward(self, gradient: Array | None = None) -> None:
        """Adds d(self)/d(leaf) * gradient to the `grad` of every leaf. `gradient` is ones where self has one element.

        The tape is used up: a second call raises.
        """
        if self._node is None:
            raise RuntimeError(
                "[backward] this tensor was not recorded: no input requires a gradient, or recording was off (no_grad)"
            )
        if gradient is None:
            if self.data.size != 1:
                raise ValueError(
                    f"[backward] gradient must be given for a tensor of shape {self.shape}; only one element has a default"
                )
            gradient = np.ones(self.shape, np.float32)
        if tuple(gradient.shape) != self.shape:
            raise ValueError(f"[backward] gradient must have the tensor's shape {self.shape}, got {tuple(gradient.shape)}")
        _run(self, gradient)


def _run(root: Tensor, gradient: Array) -> None:
    nodes: dict[int, Tensor] = {}
    stack = [root]
    while stack:
        tensor = stack.pop()
        node = tensor._node
        if node is None or node.order in nodes:
            continue
        if node is _USED:
            raise RuntimeError("[backward] this part of the tape was used already: run the forward pass again")
        nodes[node.order] = tensor
        stack.extend(p for p in node.parents if p is not None)
    gradients: dict[int, Array] = {id(root): gradient}
    owned: set[int] = set()  # gradients that this function made, and may add to
    handed = {id(gradient)}  # arrays that were a gradient of something: the caller's, and those passed on
    for order in sorted(nodes, reverse=True):
        tensor = nodes.pop(order)
        node = tensor._node
        assert node is not None
        tensor._node = _USED
        dy = gradients.pop(id(tensor), None)
        owned.discard(id(tensor))
        if dy is None:
            continue
        ds = node.backward(dy)
        for parent, d in zip(node.parents, ds, strict=True):
            if parent is None or d is None or not parent.requires_grad:
                continue
            if parent._node is None:
                if parent.grad is None and id(d) not in handed and _ours_alone(d, ds):
                    parent.grad = d
                else:
                    np.add(parent.grad_buffer(), d, out=parent.grad)
                continue
            handed.add(id(d))
            if id(parent) not in gradients:
                gradients[id(parent)] = d
            elif id(parent) in owned:
                gradients[id(parent)] += d
            else:
                gradients[id(parent)] = gradients[id(parent)] + d
                owned.add(id(parent))


def _ours_alone(d: Array, ds: Sequence[Array | None]) -> bool:
    """Whether a leaf may keep d as its `grad`, to be added to in place later: no view, and returned for no other parent."""
    return d.base.__class__ is not np.ndarray and d.flags.c_contiguous and d.dtype == np.float32 and sum(e is d for e in ds) == 1


_USED = _Node((), lambda _: (), -1)  # what stands in for a node whose backward has run


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Nothing is recorded inside, on this thread."""
    before = _state.enabled
    _state.enabled = False
    try:
        yield
    finally:
        _state.enabled = before


def data(x: Any) -> Any:
    """The array of a tensor; anything else as it is."""
    return x.data if isinstance(x, Tensor) else x


def recording(*xs: Any) -> bool:
    """Whether an operation on these must be recorded."""
    for x in xs:
        if isinstance(x, Tensor) and x.requires_grad:
            return _state.enabled
    return False


def wrap(y: Any, *xs: Any) -> Any:
    """The result of an operation that is not recorded: a Tensor if any input is one, else the array."""
    for x in xs:
        if isinstance(x, Tensor):
            return Tensor(y)
    return y


def record(y: Any, parents: Sequence[Any], backward: Backward) -> Tensor:
    """Puts an operation on the tape.

    `backward(dy)` returns one gradient for each parent, None where there is none or where it was already added to the parent's
    `grad_buffer()` (see `leaf`). A gradient is an array that `backward` made, or dy: a leaf may keep it as its `grad`.
    """
    _state.counter += 1
    out = Tensor(y, requires_grad=True)
    out._node = _Node(tuple(p if isinstance(p, Tensor) else None for p in parents), backward, _state.counter)
    return out


def record_many(ys: Sequence[Any], parents: Sequence[Any], backward: Callable[..., Sequence[Array | None]]) -> tuple[Tensor, ...]:
    """As `record`, for an operation with several outputs: `backward(*dys)` gets None for an output that had no gradient."""
    dys: list[Array | None] = [None] * len(ys)
    # A node between the parents and the outputs: recorded before the outputs, it runs when all of their gradients are there.
    joint = record(ys[0], parents, lambda _: backward(*dys))

    def output(i: int) -> Backward:
        def keep(dy: Array) -> Sequence[Array | None]:
            first = all(d is None for d in dys)
            dys[i] = dy
            return (dy if first else None,)  # any gradient will do to have the joint node run, once

        return keep

    return tuple(record(y, (joint,), output(i)) for i, y in enumerate(ys))


def accumulator(parameter: Any) -> tuple[Array | None, Array | None]:
    """Where a kernel adds a parameter's gradient, and what the backward rule then returns for it.

    A leaf's own buffer and None; a fresh buffer, twice, for a computed parameter; None and None where no gradient is wanted.
    """
    if not needs_grad(parameter):
        return None, None
    target = leaf(parameter)
    if target is not None:
        return target.grad_buffer(), None
    fresh = backend.zeros(parameter.shape)
    return fresh, fresh


def needs_grad(x: Any) -> bool:
    """Whether the backward pass must compute this input's gradient."""
    return isinstance(x, Tensor) and x.requires_grad


def leaf(x: Any) -> Tensor | None:
    """x if it is a leaf that wants a gradient: its gradient may be added to `x.grad_buffer()` instead of being returned."""
    return x if isinstance(x, Tensor) and x.requires_grad and x._node is None else None
