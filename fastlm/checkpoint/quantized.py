"""A weight kept in ggml's quantised blocks, as a GGUF file carries it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlm import _C

# kind -> (ggml type id, weights in a block, bytes of a block)
FORMATS: dict[str, tuple[int, int, int]] = dict(_C.quant_formats)
_POOLED = 1 << 16  # bytes from which the block cache is worth its call


class QuantizedArray:
    """A read-only matrix of quantised weights.

    kind: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K" or "Q6_K". shape: (out, in), or more axes before `in`; `in` is a
    multiple of the kind's block. blocks: (rows, bytes of a row) uint8 with rows = the product of all axes but the last, possibly
    memory-mapped. cache: where an operation keeps a repacked copy; it takes no part in comparison.

    Raises TypeError and ValueError for arguments that do not fit together.
    """

    __slots__ = ("__weakref__", "blocks", "cache", "kind", "shape")

    kind: str
    shape: tuple[int, ...]
    blocks: NDArray[np.uint8]
    cache: dict[str, Any]

    def __init__(self, kind: str, shape: tuple[int, ...], blocks: NDArray[np.uint8]) -> None:
        if kind not in FORMATS:
            raise ValueError(f"[QuantizedArray] kind must be one of {', '.join(FORMATS)}, got {kind!r}.")
        shape = tuple(int(n) for n in shape)
        if not shape or min(shape) < 0:
            raise ValueError(f"[QuantizedArray] shape must be (out, in) without negative sizes, got {shape}.")
        _, values, size = FORMATS[kind]
        if shape[-1] % values:
            raise ValueError(f"[QuantizedArray] the last axis must be a multiple of {values} for {kind}, got shape {shape}.")
        rows = 1
        for n in shape[:-1]:
            rows *= n
        expected = (rows, shape[-1] // values * size)
        if not isinstance(blocks, np.ndarray) or blocks.dtype != np.uint8:
            got = blocks.dtype if isinstance(blocks, np.ndarray) else type(blocks).__name__
            raise TypeError(f"[QuantizedArray] blocks must be a uint8 array, got {got}.")
        if blocks.shape != expected:
            raise ValueError(
                f"[QuantizedArray] blocks must be (rows, bytes of a row) = {expected} for {kind} {shape}, got {blocks.shape}."
            )
        set_ = object.__setattr__
        set_(self, "kind", kind)
        set_(self, "shape", shape)
        set_(self, "blocks", np.ascontiguousarray(blocks))
        set_(self, "cache", {})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"[QuantizedArray] {name} cannot be set: the array is read-only.")

    @property
    def dtype(self) -> str:
        """The kind: what stands where an array's dtype would."""
        return self.kind

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights, not bytes."""
        n = 1
        for axis in self.shape:
            n *= axis
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised blocks."""
        return int(self.blocks.nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"QuantizedArray({self.kind}, {self.shape}, {self.nbytes} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedArray, (self.kind, self.shape, np.array(self.blocks))

    def dequantize(self) -> NDArray[np.float32]:
        """The weights as float32, (out, in): the bits of ggml's reference."""
        w = _empty((self.blocks.shape[0], self.shape[-1]))
        _C.dequantize(w, self.blocks, None, FORMATS[self.kind][0])
        return w.reshape(self.shape)

    def dequantize_rows(self, ids: Any) -> NDArray[np.float32]:
        """Rows of a matrix as float32: ids (...) of any integer dtype -> (..., in).

        Raises TypeError for ids that are not integers, IndexError for one outside [0, out).
        """
        if len(self.shape) != 2:
            raise ValueError(f"[dequantize_rows] the array must have two axes, got shape {self.shape}.")
        index = np.asarray(ids)
        if index.dtype.kind not in "iu":
            raise TypeError(f"[dequantize_rows] ids must be integers, got {index.dtype}.")
        if index.size:
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.shape[0]:
                raise IndexError(f"[dequantize_rows] ids must be in [0, {self.shape[0]}), got {low if low < 0 else high}.")
        flat = np.ascontiguousarray(index, np.int64).reshape(-1)
        w = _empty((flat.size, self.shape[1]))
        _C.dequantize(w, self.blocks, flat, FORMATS[self.kind][0])
        return w.reshape(*index.shape, self.shape[1])


def _empty(shape: tuple[int, int]) -> NDArray[np.float32]:
    if shape[0] * shape[1] * 4 < _POOLED:
        return np.empty(shape, np.float32)
    w: NDArray[np.float32] = _C.empty(shape, np.dtype(np.float32))
    return w
