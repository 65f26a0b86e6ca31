"""Linear layers side by side: several weights that read one x, in one launch; a gate and what it multiplies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.checkpoint.quantized import FORMATS, LOSSLESS, ROW, QuantizedArray
from fastlm.ops import check
from fastlm.ops.activation import KINDS
from fastlm.ops.gated import gated
from fastlm.ops.linear import fast_weight, linear, packed
from fastlm.ops.matmul import STORAGE, product
from fastlm.tensor import data, recording, wrap

_FEW = 12  # rows: above, a launch costs nothing beside its product; packing x once, or rounding it to 8 bits, still gains
_F32 = np.dtype(np.float32)


def linears(x: Any, weights: Sequence[Any], biases: Sequence[Any] | None = None, fast: bool = False) -> list[Any]:
    """[linear(x, weight, bias, fast=fast) for each], with the same bits.

    For a few rows, as decoding has them, products of one storage are one launch: the threads are woken once. So are those of plain
    arrays and those with x rounded to 8 bits, for any number of rows: x is packed or rounded once; of Q8_ROW those whose columns are
    the same, as `lm.quantize` makes them. Else, and where a gradient is wanted, they are what `linear` makes of them, which also says
    what is wrong.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(biases) != len(weights):
        raise ValueError(f"[linears] weights must be one or more, biases as many, got {len(weights)} and {len(biases)}.")
    xd, ws, bs = data(x), [data(w) for w in weights], [data(b) for b in biases]
    exact = fast and isinstance(ws[0], QuantizedArray) and ws[0].activations == "float32"
    if recording(x, *weights, *biases) or exact or not _together(xd, ws, bs):
        return [linear(x, w, b, fast=fast) for w, b in zip(weights, biases, strict=True)]
    first = ws[0]
    fast = fast and fast_weight(xd, first) is not None
    one = not fast and xd.size == xd.shape[-1] and first.dtype == _F32 and all(b is None for b in bs)
    if one and (wt := backend.turned(ws)) is not None:
        ends = list(itertools.accumulate(w.shape[0] for w in ws))
        y = backend.empty((*xd.shape[:-1], ends[-1]))
        product(y, xd, wt, 1, ends[-1], xd.shape[-1])
        return [wrap(y[..., end - w.shape[0] : end], x, *weights) for w, end in zip(ws, ends, strict=True)]
    ys: list[Array] = [backend.empty((*xd.shape[:-1], w.shape[0])) for w in ws]
    if isinstance(first, QuantizedArray) and first.kind == ROW:
        _C.int8_rows_together(ys, xd, [packed(w) for w in ws], first.columns, bs)
    elif isinstance(first, QuantizedArray) and first.kind == LOSSLESS:
        _C.lossless_matmuls(ys, xd, [w.blocks for w in ws], bs, first.value_bytes)
    elif isinstance(first, QuantizedArray):
        multiply = _C.int8_matmuls if first.activations == "int8" else _C.quantized_matmuls
        multiply(ys, xd, [packed(w) for w in ws], bs, FORMATS[first.kind][0])
    elif fast:
        _C.fast_inner_products(ys, xd, ws, bs)
    else:
        _C.matmuls(ys, xd, ws, bs, STORAGE[first.dtype])
    return [wrap(y, x, *weights, *biases) for y in ys]


def gated_linears(x: Any, gate: Any, up: Any, kind: str, biases: Sequence[Any] = (None, None)) -> Any:
    """gated(linear(x, gate), linear(x, up), kind), with the same bits; biases of gate and up.

    With 8-bit activations one launch: the gate's product never goes to memory.
    """
    xd, ws, bs = data(x), [data(gate), data(up)], [data(b) for b in biases]
    one = not recording(x, gate, up, *biases) and ws[0].shape == ws[1].shape and _rounded(ws[0]) and ws[0].kind != ROW
    one = one and _together(xd, ws, bs)
    if not one:
        first, second = linears(x, (gate, up), biases)
        return gated(first, second, kind)
    y = backend.empty((*xd.shape[:-1], ws[0].shape[0]))
    number = check.choice("gated_linears", "kind", kind, KINDS)
    _C.int8_gated(y, xd, packed(ws[0]), packed(ws[1]), *bs, FORMATS[ws[0].kind][0], number)
    return wrap(y, x, gate, up)


def _rounded(w: Any) -> bool:
    """Whether x is rounded to 8 bits for this weight."""
    return isinstance(w, QuantizedArray) and w.activations == "int8"


def _together(x: Any, weights: Sequence[Any], biases: Sequence[Any]) -> bool:
    """Whether the products can be one launch, and should."""
    ready = type(x) is np.ndarray and x.dtype == _F32 and x.ndim > 0 and x.flags.c_contiguous and 1 < len(weights) <= _C.together
    once = _rounded(weights[0]) or isinstance(weights[0], np.ndarray)  # x is made ready for all
    if not ready or not 0 < math.prod(x.shape[:-1]) <= (1 << 62 if once else _FEW):
        return False
    return all(_fits(w, b, weights[0], x.shape[-1]) for w, b in zip(weights, biases, strict=True))


def _same(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _fits(w: Any, b: Any, first: Any, K: int) -> bool:
    """Whether a weight and its bias are what `linear` takes, and of the storage of the first."""
    if b is not None and not (type(b) is np.ndarray and b.dtype == _F32 and b.shape == (w.shape[0],) and b.flags.c_contiguous):
        return False
    if isinstance(w, QuantizedArray):
        alike = isinstance(first, QuantizedArray) and w.kind == first.kind and w.activations == first.activations
        alike = alike and w.activations != "int16"  # a head's, which has no such launch
        alike = alike and (
            w.kind in FORMATS
            or (w.kind == LOSSLESS and w.value_bytes == first.value_bytes)
            or (w.kind == ROW and _same(w.columns, first.columns))
        )
    else:
        alike = type(w) is np.ndarray and w.dtype == first.dtype and w.dtype in STORAGE and w.flags.c_contiguous
    return alike and len(w.shape) == 2 and w.shape[1] == K
