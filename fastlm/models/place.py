"""A model's weights on a device, or back on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import BFLOAT16
from fastlm.checkpoint.quantized import QuantizedArray
from fastlm.nn.module import Declared, Module
from fastlm.tensor import Tensor

DTYPES = backend.DTYPES


def place_model(model: Module, device: Any, dtype: str | None) -> None:
    """See LanguageModel.to. device None: the host."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[to] dtype must be None, 'float32' or 'bfloat16', got {dtype!r}.")
    parameters = model.named_parameters()
    if device is not None and (why := getattr(model, "host_only", "")):
        raise NotImplementedError(f"[to] {type(model).__name__} runs on the CPU alone: {why}.")
    for name, p in parameters.items():
        if isinstance(p.data, Declared):
            raise ValueError(f"[to] {name} has no value yet: load or initialise the model first.")
        if isinstance(p.data, QuantizedArray) and device is not None:
            raise NotImplementedError(f"[to] {name} is quantised, which the GPU does not read yet: load with dtype='bfloat16'.")
    matrices = DTYPES[dtype] if dtype is not None else _storage(parameters)
    for p in parameters.values():
        if isinstance(p.data, QuantizedArray):
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


def _storage(parameters: dict[str, Tensor]) -> np.dtype[Any]:
    """bfloat16 where a matrix is, else float32."""
    half = any(p.ndim > 1 and p.dtype == BFLOAT16 for p in parameters.values())
    return BFLOAT16 if half else np.dtype(np.float32)


def placed(array: Any, device: Any, dtype: Any) -> Any:
    """The array there, in this dtype; itself where it is that. Converted on the host: weights move once."""
    if array.dtype == dtype:
        return backend.put(array, device)
    host = backend.host(array)
    return backend.put(host.astype(dtype), device)
