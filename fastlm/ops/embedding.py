"""Embedding: rows of a table by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastlm import _C, backend
from fastlm.backend import Array, contiguous, kernels
from fastlm.checkpoint.quantized import FORMATS, LOSSLESS, QuantizedArray
from fastlm.ops import check
from fastlm.tensor import accumulator, data, record, recording, wrap

_TABLE_TYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def embedding(ids: Any, weight: Any, dtype: Any = None) -> Any:
    """weight[ids] in float32.

    ids: any shape, int32 or int64, each from 0 to V - 1. weight: (V, C) float32, bfloat16 or QuantizedArray. Returns float32
    (*ids.shape, C): a Tensor where weight is one. The gradient adds the rows in the order of the ids: it has the same bits on any
    number of threads. Raises TypeError for a dtype, ValueError for a shape or an id out of range (it names the first).

    On a device the rows have the dtype of weight (float32 where that is quantised), or `dtype`, which may be float32 where weight is
    bfloat16, and any where it is quantised. ids of the host are put there; an id that is there already and out of range gives nan and no
    gradient.
    """
    ids = data(ids)
    host = isinstance(ids, np.ndarray)
    if not host and not backend.on_device(ids):
        raise TypeError(f"[embedding] ids must be a NumPy array, got {type(ids).__name__}.")
    if ids.dtype != np.int32 and ids.dtype != np.int64:
        raise TypeError(f"[embedding] ids must be int32 or int64, got {ids.dtype}. Convert it with ids.astype('int32').")
    ids = contiguous(ids) if ids.ndim else ids
    wd = data(weight)
    quantised = isinstance(wd, QuantizedArray)
    if not quantised:
        wd = check.any_array("embedding", "weight", wd)
        if wd.dtype not in _TABLE_TYPES:
            raise TypeError(f"[embedding] weight must be float32, bfloat16 or a QuantizedArray, got {wd.dtype}.")
        wd = contiguous(wd)
    if len(wd.shape) != 2:
        raise ValueError(f"[embedding] weight must be (V, C), got {tuple(wd.shape)}.")
    V, C = wd.shape
    rows = wd.blocks if quantised else wd
    if host:
        bad = _C.embedding_first_outside(ids, V)
        if bad >= 0:
            at = tuple(int(i) for i in np.unravel_index(bad, ids.shape))
            raise ValueError(
                f"[embedding] ids must be from 0 to {V - 1} (weight is {(V, C)}), got {ids.flat[bad]} at ids{list(at)}."
            )
        if (device := backend.device_of(rows)) is not None:
            ids = device.put(ids.astype(np.int32))
    elif backend.device_of(rows) is None:
        raise TypeError("[embedding] weight must be on the device that ids are on.")
    y = backend.empty((*ids.shape, C), _dtype(rows, quantised, dtype), like=rows)
    if quantised:
        if recording(weight):
            raise TypeError("[embedding] weight is quantised and has no gradient. Train a dequantised copy: weight.dequantize().")
        if wd.kind == LOSSLESS:
            _C.lossless_unpack(y, rows, ids, wd.value_bytes)
            return wrap(y, weight)
        if wd.kind not in FORMATS:
            check.on_host("embedding", "a weight with one scale a row", rows)
            return wrap(wd.dequantize_rows(ids), weight)
        kernels(rows).dequantize(y, rows, ids, FORMATS[wd.kind][0])
        return wrap(y, weight)
    kernels(rows).embedding_forward(y, ids, wd)
    if not recording(weight):
        return wrap(y, weight)

    def backward(dy: Array) -> Sequence[Array | None]:
        target, dweight = accumulator(weight)
        kernels(rows).embedding_backward(target, ids, contiguous(dy))
        if dweight is None or not backend.on_device(dweight):
            return (dweight,)
        return (backend.cast(dweight, wd.dtype),)  # what was computed in bfloat16 has such a gradient

    return record(y, (weight,), backward)


def _dtype(rows: Array, quantised: bool, asked: Any) -> Any:
    """The dtype of what is read."""
    if isinstance(rows, np.ndarray) or (asked is None and quantised):
        kept = [_TABLE_TYPES[0]]
    elif quantised:
        kept = list(_TABLE_TYPES)
    else:
        kept = sorted({rows.dtype, _TABLE_TYPES[0]}, key=lambda d: d != rows.dtype)
    chosen = np.dtype(kept[0] if asked is None else asked)
    if chosen not in kept:
        raise TypeError(f"[embedding] dtype must be one of {', '.join(map(str, kept))}, got {chosen}.")
    return chosen
