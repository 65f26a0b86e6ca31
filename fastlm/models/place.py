"""A model's weights on a device, or back on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import BFLOAT16
from fastlm.checkpoint.quantized import LOSSLESS, QuantizedArray
from fastlm.nn.linear import Embedding
from fastlm.nn.module import Declared, Module
from fastlm.tensor import Tensor

DTYPES = backend.DTYPES


def place_model(model: Module, device: Any, dtype: str | None) -> None:
    """See LanguageModel.to. device None: the host."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[to] dtype must be None, 'float32' or 'bfloat16', got {dtype!r}.")
    parameters = model.named_parameters()
    for name, p in parameters.items():
        if isinstance(p.data, Declared):
            raise ValueError(f"[to] {name} has no value yet: load or initialise the model first.")
        if device is not None and isinstance(p.data, QuantizedArray) and p.data.kind == LOSSLESS:
            p.data = p.data.plain()  # a form for the host
    matrices = DTYPES[dtype] if dtype is not None else _storage(parameters)
    for p in parameters.values():
        if isinstance(p.data, QuantizedArray):
            p.data = placed_blocks(p.data, device)
            continue
        wanted = matrices if device is not None or p.ndim > 1 else DTYPES["float32"]
        p.data, p.grad = placed(p.data, device, wanted), None
        p.requires_grad = p.requires_grad and wanted == np.float32
    for part, name in model.arrays():
        array = part.__dict__[name]
        floats = array.dtype.kind in "fV"
        part.__dict__[name] = placed(
            array, device, (matrices if device is not None else DTYPES["float32"]) if floats else array.dtype
        )
    for table in _embeddings(model):
        table.dtype = matrices if device is not None and isinstance(table.weight.data, QuantizedArray) else None


def _embeddings(model: Module) -> Iterator[Embedding]:
    for _, part in model.parts():
        if isinstance(part, Embedding):
            yield part
        elif isinstance(part, Module):
            yield from _embeddings(part)


def _storage(parameters: dict[str, Tensor]) -> np.dtype[Any]:
    """bfloat16 where a matrix is, or what lies beside quantised ones on a device; else float32."""
    half = any(p.dtype == BFLOAT16 for p in parameters.values())
    return BFLOAT16 if half else np.dtype(np.float32)


def placed_blocks(w: QuantizedArray, device: Any) -> QuantizedArray:
    """The quantised weight there; itself where it is there."""
    if w.device is device:
        return w
    return QuantizedArray(w.kind, w.shape, backend.put(w.blocks, device), w.activations, backend.put(w.columns, device))


def placed(array: Any, device: Any, dtype: Any) -> Any:
    """The array there, in this dtype; itself where it is that. Converted on the host: weights move once."""
    if array.dtype == dtype:
        return backend.put(array, device)
    host = backend.host(array)
    return backend.put(host.astype(dtype), device)
