"""Linear layers side by side: several weights that read one x, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.checkpoint.quantized import FORMATS, QuantizedArray
from fastlm.ops.linear import linear, packed
from fastlm.ops.matmul import STORAGE
from fastlm.tensor import data, recording, wrap

_FEW = 12  # rows: above, a launch costs nothing beside its product
_F32 = np.dtype(np.float32)


def linears(x: Any, weights: Sequence[Any], biases: Sequence[Any] | None = None) -> list[Any]:
    """[linear(x, weight, bias) for each], with the same bits.

    For a few rows, as decoding has them, products of one storage are one launch: the threads are woken once. So they are for any rows
    where x is rounded to 8 bits, which then happens once. Else, and where a gradient is wanted, they are what `linear` makes of them,
    which also says what is wrong.
    """
    biases = [None] * len(weights) if biases is None else biases
    xd, ws, bs = data(x), [data(w) for w in weights], [data(b) for b in biases]
    rounded = [w.activations == "int8" for w in ws if isinstance(w, QuantizedArray)]
    ready = type(xd) is np.ndarray and xd.dtype == _F32 and xd.ndim > 0 and xd.flags.c_contiguous and 1 < len(ws) <= _C.together
    ready = ready and 0 < math.prod(xd.shape[:-1]) <= (1 << 62 if any(rounded) else _FEW) and not recording(x, *weights, *biases)
    if not ready or not all(_fits(w, b, ws[0], xd.shape[-1]) for w, b in zip(ws, bs, strict=True)):
        return [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    ys: list[Array] = [backend.empty((*xd.shape[:-1], w.shape[0])) for w in ws]
    first = ws[0]
    if isinstance(first, QuantizedArray):
        multiply = _C.int8_matmuls if first.activations == "int8" else _C.quantized_matmuls
        multiply(ys, xd, [packed(w) for w in ws], bs, FORMATS[first.kind][0])
    else:
        _C.matmuls(ys, xd, ws, bs, STORAGE[first.dtype])
    return [wrap(y, x, *weights, *biases) for y in ys]


def _fits(w: Any, b: Any, first: Any, K: int) -> bool:
    """Whether a weight and its bias are what `linear` takes, and of the storage of the first."""
    if b is not None and not (type(b) is np.ndarray and b.dtype == _F32 and b.shape == (w.shape[0],) and b.flags.c_contiguous):
        return False
    if isinstance(w, QuantizedArray):
        alike = (
            isinstance(first, QuantizedArray) and w.kind == first.kind and w.activations == first.activations and w.kind in FORMATS
        )
    else:
        alike = type(w) is np.ndarray and w.dtype == first.dtype and w.dtype in STORAGE and w.flags.c_contiguous
    return alike and len(w.shape) == 2 and w.shape[1] == K
