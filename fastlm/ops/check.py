"""Checks of shape and dtype with one form of message: `[op] name must be (C,) = (768,), got (1024,). x is (4, 128, 768).`"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import BFLOAT16, Array, contiguous, on_device

_FLOAT32 = np.dtype(np.float32)
WORD = (1 << 64) - 1
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # of float32's normal numbers


def array(op: str, name: str, x: Any, dtype: Any = _FLOAT32, ndim: int | None = None, at_least: int = 0) -> Array:
    """x as a C-contiguous array of `dtype`, or a TypeError / ValueError that names it. Nothing is cast."""
    if type(x) is np.ndarray and x.dtype is dtype and ndim is None and x.ndim >= at_least and x.flags.c_contiguous:
        return x  # the usual case, in the fewest steps: one decode step makes hundreds of these calls
    y = any_array(op, name, x, dtype, at_least)
    if ndim is not None and y.ndim != ndim:
        raise ValueError(f"[{op}] {name} must have {ndim} axes, got shape {y.shape}.")
    return contiguous(y)


def any_array(op: str, name: str, x: Any, dtype: Any = None, at_least: int = 0) -> Array:
    """x as it is, with any strides and, where `dtype` is None, any dtype."""
    if not isinstance(x, np.ndarray) and not on_device(x):
        raise TypeError(f"[{op}] {name} must be a NumPy array or a Tensor, got {type(x).__name__}.")
    if dtype == _FLOAT32 and x.dtype == BFLOAT16 and not isinstance(x, np.ndarray):
        dtype = BFLOAT16  # a device computes with either
    if dtype is not None and x.dtype is not dtype and x.dtype != dtype:  # identity first: it is the usual case, and cheaper
        raise TypeError(
            f"[{op}] {name} must be {np.dtype(dtype)}, got {x.dtype}. Convert it with {name}.astype('{np.dtype(dtype)}')."
        )
    if x.ndim < at_least:
        raise ValueError(f"[{op}] {name} must have at least {at_least} axes, got shape {x.shape}.")
    array: Array = x
    return array


def ids(op: str, ids: Array, table: tuple[int, ...]) -> None:
    """ValueError, with the first of them, unless all ids are rows of a table (V, C). For ids of the host."""
    if ids.dtype not in (np.int32, np.int64):
        raise TypeError(f"[{op}] ids must be int32 or int64, got {ids.dtype}. Convert it with ids.astype('int32').")
    flat = np.ascontiguousarray(ids)
    bad = _C.embedding_first_outside(flat, table[0])
    if bad >= 0:
        at = tuple(int(i) for i in np.unravel_index(bad, flat.shape))
        raise ValueError(
            f"[{op}] ids must be from 0 to {table[0] - 1} (weight is {tuple(table)}), got {flat.flat[bad]} at ids{list(at)}."
        )


def together(op: str, x_name: str, x: Any, **others: Any) -> None:
    """TypeError unless the others, which may be None, are where x is: nothing is copied between devices by itself."""
    where = backend.device_of(x)
    for name, y in others.items():
        if y is not None and (there := backend.device_of(y)) is not where:
            raise TypeError(
                f"[{op}] {name} is on {_place(there)}, {x_name} is on {_place(where)}: "
                f"put it there with fastlm.backend.put({name}, {x_name}.device)."
                if where is not None
                else f"[{op}] {name} is on {_place(there)}, {x_name} is on the host: put {x_name} there with fastlm.backend.put."
            )


def on_host(op: str, name: str, x: Any) -> None:
    """NotImplementedError for an operation that has no kernels for a device yet: nothing is computed on the host by the way."""
    if on_device(x):
        raise NotImplementedError(f"[{op}] {name} is on {_place(x.device)}: this operation has no kernel for a GPU yet.")


def _place(device: Any) -> str:
    return "the host" if device is None else str(device.name)


def weight(op: str, name: str, w: Any, x: Array) -> Array:
    """w as a C-contiguous float32 array of the shape (C,), the last axis of x."""
    y = array(op, name, w)
    if y.shape != x.shape[-1:]:
        shape(op, name, y, "(C,)", x.shape[-1:], f"x is {x.shape}.")
    return y


def choice(op: str, name: str, x: Any, known: dict[str, int]) -> int:
    """The number of a name, or a ValueError that lists the known ones."""
    try:
        return known[x]
    except (KeyError, TypeError):
        raise ValueError(f"[{op}] {name} must be one of {', '.join(map(repr, known))}, got {x!r}.") from None


def shape(op: str, name: str, x: Array, symbols: str, expected: tuple[int, ...], note: str = "") -> None:
    """ValueError unless x has the expected shape. `symbols` is how the docstring writes it: "(C,)"."""
    if tuple(x.shape) != expected:
        raise ValueError(f"[{op}] {name} must be {symbols} = {expected}, got {tuple(x.shape)}.{' ' + note if note else ''}")


def number(op: str, name: str, x: Any, low: float = -np.inf, high: float = np.inf, above: float | None = None) -> float:
    """x as a float within [low, high], and > above."""
    value = real(op, name, x)
    if not (low <= value <= high) or (above is not None and not value > above):
        bound = f"greater than {above}" if above is not None and not value > above else f"from {low} to {high}"
        raise ValueError(f"[{op}] {name} must be {bound}, got {value}.")
    return value


def real(op: str, name: str, x: Any) -> float:
    """x as a float, whatever its value, or a TypeError. Text is no number, though float would read it."""
    try:
        if not isinstance(x, (str, bytes, bytearray)):
            return float(x)
    except OverflowError:  # an integer that float64 does not reach
        return math.inf if x > 0 else -math.inf
    except (TypeError, ValueError):
        pass
    raise TypeError(f"[{op}] {name} must be a number, got {type(x).__name__}.")


def integer(
    op: str, name: str, x: Any, low: int | None = None, high: int | None = None, what: str = "", wrong: type[Exception] = TypeError
) -> int:
    """x as an int, or an error that says what it must be: `wrong` where it is no integer, ValueError where it is below low or above
    high. Nothing is cut off: 2.0 is refused as 2.5 is. what: "an integer of at least LOW" where it says nothing else."""
    value = None
    if not isinstance(x, (bool, np.bool_)):
        with contextlib.suppress(TypeError):
            value = operator.index(x)
    above = value is not None and high is not None and value > high
    if value is not None and not above and (low is None or value >= low):
        return value
    what = what or (f"an integer of at most {high}" if above else f"an integer of at least {low}")
    same = value is None and isinstance(x, (float, np.floating)) and float(x).is_integer() and (low is None or x >= low)
    advice = f" Give {int(x)}." if same else ""
    raise (wrong if value is None else ValueError)(f"[{op}] {name} must be {what}, got {x!r:.80}.{advice}")


def seed(op: str, value: Any, wrong: type[Exception] = TypeError) -> int:
    """A seed as an int. Its 64 bits count: -1 is 2^64 - 1."""
    return integer(op, "seed", value, -(1 << 63), WORD, "an integer of 64 bits", wrong)


def philox(op: str, key: Any, stream: int) -> np.random.Generator:
    """The generator with the key (seed, stream), or an error. Of a list that holds a seed beyond 2^63 NumPy would make floats."""
    return np.random.Generator(np.random.Philox(key=np.array([seed(op, key) & WORD, stream], np.uint64)))
