"""Embedding: rows of a table by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array
from fastlm.checkpoint.quantized import FORMATS, QuantizedArray
from fastlm.ops import check
from fastlm.tensor import accumulator, data, record, recording, wrap

_TABLE_TYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def embedding(ids: Any, weight: Any) -> Any:
    """weight[ids] in float32.

    ids: any shape, int32 or int64, each from 0 to V - 1. weight: (V, C) float32, bfloat16 or QuantizedArray. Returns float32
    (*ids.shape, C): a Tensor where weight is one. The gradient adds the rows in the order of the ids: it has the same bits on any
    number of threads. Raises TypeError for a dtype, ValueError for a shape or an id out of range (it names the first).
    """
    ids = data(ids)
    if not isinstance(ids, np.ndarray):
        raise TypeError(f"[embedding] ids must be a NumPy array, got {type(ids).__name__}.")
    if ids.dtype != np.int32 and ids.dtype != np.int64:
        raise TypeError(f"[embedding] ids must be int32 or int64, got {ids.dtype}. Convert it with ids.astype('int32').")
    if not ids.flags.c_contiguous:
        ids = np.ascontiguousarray(ids)
    wd = data(weight)
    quantised = isinstance(wd, QuantizedArray)
    if not quantised:
        wd = check.any_array("embedding", "weight", wd)
        if wd.dtype not in _TABLE_TYPES:
            raise TypeError(f"[embedding] weight must be float32, bfloat16 or a QuantizedArray, got {wd.dtype}.")
        if not wd.flags.c_contiguous:
            wd = np.ascontiguousarray(wd)
    if len(wd.shape) != 2:
        raise ValueError(f"[embedding] weight must be (V, C), got {tuple(wd.shape)}.")
    V, C = wd.shape
    bad = _C.embedding_first_outside(ids, V)
    if bad >= 0:
        at = tuple(int(i) for i in np.unravel_index(bad, ids.shape))
        raise ValueError(f"[embedding] ids must be from 0 to {V - 1} (weight is {(V, C)}), got {ids.flat[bad]} at ids{list(at)}.")
    if quantised:
        if recording(weight):
            raise TypeError("[embedding] weight is quantised and has no gradient. Train a dequantised copy: weight.dequantize().")
        y = backend.empty((*ids.shape, C))
        _C.dequantize(y, wd.blocks, ids, FORMATS[wd.kind][0])
        return wrap(y, weight)
    y = backend.empty((*ids.shape, C))
    _C.embedding_forward(y, ids, wd)
    if not recording(weight):
        return wrap(y, weight)

    def backward(dy: Array) -> Sequence[Array | None]:
        target, dweight = accumulator(weight)
        _C.embedding_backward(target, ids, np.ascontiguousarray(dy))
        return (dweight,)

    return record(y, (weight,), backward)
