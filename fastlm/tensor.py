"""Tensor and the tape: define-by-run reverse-mode differentiation over fused operations.

An operation computes with NumPy arrays and, where a gradient will be asked for, calls `record` with a function that maps the
output's gradient to its inputs' gradients. `Tensor.backward` runs these functions in reverse order of recording. Parameter gradients
are accumulated in place (`grad_buffer`), activation gradients are handed on and dropped.

Memory: the tape holds nodes, not tensors, so an operation keeps alive only what its backward function refers to: it should refer to
arrays, not to Tensors. An output that is cheap to compute again is not kept at all (`Remade`, `keep`). Each node's function is
dropped as soon as it has run. A gradient that nothing else refers to is overwritten where it saves a copy (`Spare`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array

Backward = Callable[..., Sequence[Array | None]]


class _State(threading.local):
    enabled = True
    counter = 0


_state = _State()


class _Node:
    __slots__ = ("backward", "order", "parents", "reuses")

    def __init__(self, parents: tuple[_Node | Tensor | None, ...], backward: Backward | None, order: int, reuses: bool) -> None:
        self.parents = parents  # a leaf is its own Tensor
        self.backward = backward  # None once it has run
        self.order = order
        self.reuses = reuses


class Spare:
    """What a backward function recorded with `reuses=True` gets beside dy.

    `dy`: the output's gradient again where nothing else refers to it, so that it may be overwritten; else None. `onto`: the gradient
    that the first parent has so far, to be added to in place and returned as that parent's gradient, or None where it has none.
    """

    __slots__ = ("dy", "onto")

    def __init__(self, dy: Array | None, onto: Array | None) -> None:
        self.dy, self.onto = dy, onto


class Remade:
    """An output that the backward pass computes again instead of keeping it. `users`: those that will ask for it."""

    __slots__ = ("array", "make", "users")

    def __init__(self, make: Callable[[], Array]) -> None:
        self.make, self.users = make, 0
        self.array: Array | None = None

    def __call__(self) -> Array:
        array = self.make() if self.array is None else self.array
        self.users -= 1
        self.array = array if self.users > 0 else None
        return array


class Tensor:
    """An array and its place on the tape.

    `data` is a NumPy array. A tensor made by the user with `requires_grad` is a leaf: `backward` adds to its `grad`, which has the
    shape of `data` and is float32.
    """

    __slots__ = ("__weakref__", "_node", "_remade", "data", "grad", "requires_grad")

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data: Any = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: _Node | None = None
        self._remade: Remade | None = None

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
        """The array itself, not a copy; a copy of what is on a device."""
        return backend.host(self.data)

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
            self.grad = backend.zeros(self.shape, like=self.data)
        return self.grad

    def grad_target(self) -> tuple[Array, bool]:
        """`grad` and True: add to it. Where there was none, fresh memory and False: assign."""
        if self.grad is not None:
            return self.grad, True
        self.grad = backend.empty(self.shape, like=self.data)
        return self.grad, False

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
            gradient = backend.ones_like(self.data)
        if tuple(gradient.shape) != self.shape:
            raise ValueError(f"[backward] gradient must have the tensor's shape {self.shape}, got {tuple(gradient.shape)}")
        _run(self._node, gradient)


def _run(root: _Node, gradient: Array) -> None:
    nodes: dict[int, _Node] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node.order in nodes:
            continue
        if node.backward is None:
            raise RuntimeError("[backward] this part of the tape was used already: run the forward pass again")
        nodes[node.order] = node
        for p in node.parents:
            if p.__class__ is _Node:
                stack.append(p)
    gradients: dict[int, Array] = {root.order: gradient}  # of nodes that have not run yet
    for order in sorted(nodes, reverse=True):
        _step(nodes.pop(order), gradients)


def _step(node: _Node, gradients: dict[int, Array]) -> None:
    """Runs a node's function, drops it, and hands on what it gave. What this leaves alone is freed before the next node runs."""
    parents, backward = node.parents, node.backward
    assert backward is not None
    node.parents, node.backward = (), None
    dy = gradients.pop(node.order, None)
    if dy is None:
        return
    first = parents[0] if parents else None
    if node.reuses:
        onto = gradients.pop(first.order, None) if first.__class__ is _Node else None
        if onto is not None and not _alone(onto, 2):
            onto = backend.copy(onto)
        spare = Spare(dy if _alone(dy, 2) else None, onto)
        ds = backward(dy, spare)
        if onto is not None and ds[0] is None:
            gradients[first.order] = onto  # type: ignore[union-attr]
        del spare, onto
    else:
        ds = backward(dy)
    del backward, dy
    ds = list(ds)
    for i, parent in enumerate(parents):
        if parent is None or (d := ds[i]) is None:
            continue
        ds[i] = None  # the last parent of several with the same gradient may have it as its own
        if parent.__class__ is _Node:
            order = parent.order
            old = gradients.pop(order, None)
            if old is None:
                gradients[order] = d
            else:
                into = old if _alone(old, 2) else None
                gradients[order] = backend.add(old, d, out=into)
        else:
            assert isinstance(parent, Tensor)
            if parent.grad is not None:
                backend.add(parent.grad, d, out=parent.grad)
            elif _alone(d, 2) and d.dtype == np.float32 and _whole(d):
                parent.grad = d
            elif d.__class__ is np.ndarray or d.dtype == np.float32:
                parent.grad = backend.copy(d)
            else:  # bfloat16 on a device: gradients of leaves are float32
                parent.grad = backend.zeros(d.shape, like=d)
                backend.add(parent.grad, d, out=parent.grad)


def _whole(d: Array) -> bool:
    """Whether d has all of its memory: a piece kept as a leaf's gradient would keep the rest with it."""
    return not isinstance(d, np.ndarray) or not isinstance(d.base, np.ndarray) or d.base.nbytes == d.nbytes


def _alone(d: Array, held: int) -> bool:
    """Whether nothing but the caller refers to d: with `held` references, that of the call to sys.getrefcount not counted. A view counts
    those to its memory's owner: it alone. So does an array on a device."""
    if not isinstance(d, np.ndarray):
        owner = getattr(d, "owner", None)
        return owner is not None and sys.getrefcount(d) <= held + 1 and sys.getrefcount(owner) <= 3 and d.contiguous
    base = d.base
    return (
        sys.getrefcount(d) <= held + 1
        and (base.__class__ is not np.ndarray or (sys.getrefcount(base) <= 3 and base.base.__class__ is not np.ndarray))
        and d.flags.c_contiguous
        and d.flags.writeable
    )


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Nothing is recorded inside, on this thread."""
    return _recording(False)


def enable_grad() -> contextlib.AbstractContextManager[None]:
    """Recorded inside, on this thread, within no_grad too."""
    return _recording(True)


@contextlib.contextmanager
def _recording(on: bool) -> Iterator[None]:
    before = _state.enabled
    _state.enabled = on
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


def record(y: Any, parents: Sequence[Any], backward: Backward, reuses: bool = False, remade: Remade | None = None) -> Tensor:
    """Puts an operation on the tape.

    `backward(dy)` returns one gradient for each parent, None where there is none or where it was already added to the parent's
    `grad_buffer()` (see `leaf`). A gradient is an array that `backward` made, or dy: a leaf may keep it as its `grad`.
    reuses: it is called as `backward(dy, spare)`, see `Spare`. remade: what `keep` gives for the output.
    """
    _state.counter += 1
    out = Tensor(y, requires_grad=True)
    out._node = _Node(tuple([_parent(p) for p in parents]), backward, _state.counter, reuses)
    out._remade = remade
    return out


def _parent(p: Any) -> _Node | Tensor | None:
    if p.__class__ is not Tensor or not p.requires_grad:
        return None
    node: _Node | None = p._node
    return p if node is None else node


def record_many(ys: Sequence[Any], parents: Sequence[Any], backward: Callable[..., Sequence[Array | None]]) -> tuple[Tensor, ...]:
    """As `record`, for an operation with several outputs: `backward(*dys)` gets None for an output that had no gradient."""
    dys: list[Array | None] = [None] * len(ys)

    def joint_backward(_: Array) -> Sequence[Array | None]:
        given = tuple(dys)
        dys.clear()  # so that nothing here keeps them alive
        return backward(*given)

    # A node between the parents and the outputs: recorded before the outputs, it runs when all of their gradients are there.
    joint = record(ys[0], parents, joint_backward)

    def output(i: int) -> Backward:
        def keep(dy: Array) -> Sequence[Array | None]:
            first = all(d is None for d in dys)
            dys[i] = dy
            return (_TOKEN if first else None,)  # any gradient will do to have the joint node run, once

        return keep

    return tuple(record(y, (joint,), output(i)) for i, y in enumerate(ys))


_TOKEN = np.zeros((), np.float32)
_REMADE = 1 << 21  # bytes from which an output is rather computed again than kept


def remade(y: Array, make: Callable[[], Array]) -> Remade | None:
    """A `Remade` for an output that is worth it, else None."""
    return Remade(make) if y.nbytes >= _REMADE else None


def keep(x: Any, array: Array) -> Callable[[], Array]:
    """How the backward pass gets x's array again: a function that is called once at most. `array` is `data(x)` as the kernel read it."""
    made = x._remade if x.__class__ is Tensor else None
    if made is None or array is not x.data:
        return lambda: array
    made.users += 1
    return made


def accumulator(parameter: Any) -> tuple[Array | None, Array | None]:
    """Where a kernel adds a parameter's gradient, and what the backward rule then returns for it.

    A leaf's own buffer and None; a fresh buffer, twice, for a computed parameter; None and None where no gradient is wanted.
    """
    if not needs_grad(parameter):
        return None, None
    target = leaf(parameter)
    if target is not None:
        return target.grad_buffer(), None
    fresh = backend.zeros(parameter.shape, like=parameter.data)
    return fresh, fresh


def needs_grad(x: Any) -> bool:
    """Whether the backward pass must compute this input's gradient."""
    return isinstance(x, Tensor) and x.requires_grad


def leaf(x: Any) -> Tensor | None:
    """x if it is a leaf that wants a gradient: its gradient may be added to `x.grad_buffer()` instead of being returned."""
    return x if isinstance(x, Tensor) and x.requires_grad and x._node is None else None
