"""GGUF files: metadata and tensors, memory-mapped. Format: ggml's docs/gguf.md; the parser is csrc/formats/gguf.cpp."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlm import _C
from fastlm.checkpoint.errors import FormatError, short
from fastlm.checkpoint.mapping import BFLOAT16, map_file, view
from fastlm.checkpoint.quantized import QuantizedArray

_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


class GGUF(NamedTuple):
    """What a file holds. Metadata: numbers, bool, str; an array of numbers is a NumPy array, of strings a list."""

    metadata: dict[str, Any]
    tensors: dict[str, NDArray[Any] | QuantizedArray]


def read_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Metadata and tensors of a GGUF file, versions 2 and 3, little-endian.

    Tensors are views of the mapped file, read-only, shape in row-major order, (out, in) for a matrix: F32, F16, BF16, F64 and
    integers are arrays, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K are QuantizedArray.
    Raises FormatError for a file that is corrupt, truncated, hostile, split into parts, or of other types; OSError for one that
    cannot be opened.
    """
    memory = map_file(path, "GGUF")
    try:
        _, metadata, records = _C.gguf_parse(memory)
    except _C.ParseError as error:
        message, offset = error.args
        raise FormatError(path, message, offset) from None
    parts = metadata.get("split.count", 1)
    if isinstance(parts, np.ndarray) or parts != 1:
        raise FormatError(path, f"the model is split into {short(parts)} files: join them with llama-gguf-split --merge")
    tensors: dict[str, NDArray[Any] | QuantizedArray] = {}
    for name, kind, shape, offset, nbytes in records:
        if kind in _PLAIN:
            tensors[name] = view(memory, _PLAIN[kind], shape, offset)
        else:
            rows = int(np.prod(shape[:-1], dtype=np.int64))
            tensors[name] = QuantizedArray(kind, shape, np.frombuffer(memory, np.uint8, nbytes, offset).reshape(rows, -1))
    return GGUF(metadata, tensors)
