"""A weight kept in ggml's quantised blocks, as a GGUF file carries it, in 8 bits with one scale a row, or without loss in fewer bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlm import _C
from fastlm.checkpoint import lossless

# kind -> (ggml type id, weights in a block, bytes of a block)
FORMATS: dict[str, tuple[int, int, int]] = dict(_C.quant_formats)
ROW = "Q8_ROW"  # not ggml's: a row is its float32 scale and its codes, int8
LOSSLESS = "LOSSLESS"  # float32 or bfloat16, every bit, in 28 or 12: fastlm/checkpoint/lossless.py
KINDS = (*FORMATS, ROW, LOSSLESS)
ACTIVATIONS = ("float32", "int8")
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # of ggml's kinds those that `quantize` makes
MADE = (*WRITTEN, ROW, LOSSLESS)
_POOLED = 1 << 16  # bytes from which the block cache is worth its call


class QuantizedArray:
    """A read-only matrix of quantised weights.

    kind: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q8_ROW" or "LOSSLESS". shape: (out, in), or more axes before
    `in`; `in` is a multiple of the kind's block (Q8_ROW, LOSSLESS: any). blocks: (rows, bytes of a row) uint8 with rows = the product of
    all axes but the last, possibly memory-mapped, or an array on a device; LOSSLESS: (bytes,), on the host. cache: where an operation keeps
    a repacked copy; it takes no part in comparison.
    activations: what `linear` multiplies the weights with: "float32", the default (every bit as if they had been dequantised), or
    "int8": x is rounded to 8 bits in groups of 32, and the sums are sums of integers. `with_activations` changes it. Q8_ROW has
    "int8" alone, and rounds whole rows of x, of which two numbers stay exact; LOSSLESS has "float32" alone.
    columns: of Q8_ROW, (in,) float32 or None, where blocks are: a weight is scale * code * column, and x is multiplied by them before it
    is rounded. value_bytes: of LOSSLESS weights before they were packed, 4 or 2; else 0.

    Raises TypeError and ValueError for arguments that do not fit together.
    """

    __slots__ = ("__weakref__", "activations", "blocks", "cache", "columns", "kind", "shape", "value_bytes")

    kind: str
    shape: tuple[int, ...]
    blocks: NDArray[np.uint8]
    cache: dict[str, Any]
    activations: str
    columns: NDArray[np.float32] | None
    value_bytes: int

    def __init__(
        self,
        kind: str,
        shape: tuple[int, ...],
        blocks: NDArray[np.uint8],
        activations: str | None = None,
        columns: NDArray[np.float32] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"[QuantizedArray] kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        shape = tuple(int(n) for n in shape)
        if not shape or min(shape) < 0:
            raise ValueError(f"[QuantizedArray] shape must be (out, in) without negative sizes, got {shape}.")
        _, values, size = FORMATS.get(kind, (0, 1, 1))
        if shape[-1] % values:
            raise ValueError(f"[QuantizedArray] the last axis must be a multiple of {values} for {kind}, got shape {shape}.")
        rows = 1
        for n in shape[:-1]:
            rows *= n
        expected = (rows, shape[-1] // values * size + (4 if kind == ROW else 0))
        there = hasattr(blocks, "device") and hasattr(blocks, "pointer")  # on a device (fastlm.cuda)
        if not (isinstance(blocks, np.ndarray) or there) or blocks.dtype != np.uint8:
            got = blocks.dtype if isinstance(blocks, np.ndarray) else type(blocks).__name__
            raise TypeError(f"[QuantizedArray] blocks must be a uint8 array, got {got}.")
        value_bytes = 0
        if kind == LOSSLESS and not there:
            value_bytes = lossless.check(blocks, shape).itemsize
        elif blocks.shape != expected:
            raise ValueError(
                f"[QuantizedArray] blocks must be (rows, bytes of a row) = {expected} for {kind} {shape}, got {blocks.shape}."
            )
        set_ = object.__setattr__
        set_(self, "kind", kind)
        set_(self, "shape", shape)
        set_(self, "blocks", blocks if there else np.ascontiguousarray(blocks))
        set_(self, "cache", {})
        set_(self, "value_bytes", value_bytes)
        activations = activations or ("int8" if kind == ROW else "float32")
        if activations not in (*ACTIVATIONS, "int16"):
            raise ValueError(f"[QuantizedArray] activations must be 'float32' or 'int8', got {activations!r}.")
        if kind == ROW and activations != "int8":
            raise ValueError(f"[QuantizedArray] {ROW} weights are multiplied with int8 activations alone, got {activations!r}.")
        set_(self, "activations", activations)
        if kind == LOSSLESS and activations != "float32":
            raise ValueError(f"[QuantizedArray] {kind} weights are multiplied with float32 activations alone, got {activations!r}.")
        if columns is not None and (kind != ROW or columns.dtype != np.float32 or columns.shape != shape[-1:]):
            raise ValueError(f"[QuantizedArray] columns are for {ROW}, float32 of shape {shape[-1:]}, got {columns.shape}.")
        set_(self, "columns", columns if columns is None or there else np.ascontiguousarray(columns))

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
    def device(self) -> Any:
        """Where the blocks are: None for the host."""
        return None if isinstance(self.blocks, np.ndarray) else self.blocks.device

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
        more = "" if self.activations == "float32" else f", {self.activations} activations"
        return f"QuantizedArray({self.kind}, {self.shape}, {self.nbytes} bytes{more})"

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedArray, (self.kind, self.shape, np.array(self.blocks), self.activations, self.columns)

    def with_activations(self, activations: str) -> QuantizedArray:
        """The same weights, in the same memory, for "float32", "int8" or, for a head, "int16" activations."""
        other = QuantizedArray(self.kind, self.shape, self.blocks, activations, self.columns)
        object.__setattr__(other, "cache", self.cache)  # the layout of the packed copy is one for both
        return other

    def plain(self) -> NDArray[Any]:
        """LOSSLESS weights as they were, (out, in) float32 or bfloat16."""
        dtype = lossless.DTYPES[self.value_bytes]
        w: NDArray[Any] = _C.empty(self.shape, dtype)
        _C.lossless_unpack(w, self.blocks, None, self.value_bytes)
        return w

    def dequantize(self) -> NDArray[np.float32]:
        """The weights as float32, (out, in), where the blocks are: the bits of ggml's reference."""
        if not isinstance(self.blocks, np.ndarray):
            there = self.blocks.device.empty(self.shape)
            expand(there, self)
            return there
        if self.kind == ROW:
            return _rows(self.blocks, self.columns).reshape(self.shape)
        w = _empty((math.prod(self.shape[:-1]), self.shape[-1]))
        if self.kind == LOSSLESS:
            _C.lossless_unpack(w, self.blocks, None, self.value_bytes)
        else:
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
        if self.kind == ROW:
            return _rows(self.blocks[flat], self.columns).reshape(*index.shape, self.shape[1])
        w = _empty((flat.size, self.shape[1]))
        if self.kind == LOSSLESS:
            _C.lossless_unpack(w, self.blocks, flat, self.value_bytes)
        else:
            _C.dequantize(w, self.blocks, flat, FORMATS[self.kind][0])
        return w.reshape(*index.shape, self.shape[1])


def expand(w: Any, weight: QuantizedArray) -> None:
    """w = the weight, both on one device, w in float32 or bfloat16."""
    table = w.device.table
    if weight.kind == ROW:
        table.int8_rows_weight(w.reshape(weight.blocks.shape[0], -1), weight.blocks, weight.columns)
    else:
        table.dequantize(w, weight.blocks, None, FORMATS[weight.kind][0])


def quantize(w: Any, kind: str, columns: NDArray[np.float32] | None = None) -> QuantizedArray:
    """w (..., in) of float32, bfloat16 or float16 in blocks of 32: the bytes of ggml's reference and of `gguf.quants.quantize`; or
    with one scale a row and one a column, whose root-mean-square they make more even; or, LOSSLESS, with every bit (float16 becomes
    float32).

    kind: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_ROW" or "LOSSLESS". `in` is a multiple of 32 (Q8_ROW, LOSSLESS: any). Raises TypeError
    for a dtype; ValueError for another kind, a size, a number that is not finite, numbers so large that float16 does not hold their
    scale, and for LOSSLESS weights whose exponents are too many to be packed.
    columns: of Q8_ROW, (in,) float32, in place of w's own: those of another weight that reads the same x, which is then rounded once for
    both. On a device w is float32 or bfloat16 and kind one of ggml's; the blocks are there.
    """
    if kind not in MADE:
        raise ValueError(f"[quantize] kind must be one of {', '.join(MADE)}, got {kind!r}.")
    there = hasattr(w, "device") and hasattr(w, "pointer")
    if not (isinstance(w, np.ndarray) or there) or w.dtype.name not in ("float32", "bfloat16", *(() if there else ("float16",))):
        got = w.dtype if isinstance(w, np.ndarray) else type(w).__name__
        raise TypeError(f"[quantize] w must be a float32, bfloat16 or float16 array, got {got}.")
    type_id, values, size = FORMATS.get(kind, (0, 1, 1))
    if not w.ndim or w.shape[-1] % values:
        raise ValueError(f"[quantize] the last axis must be a multiple of {values} for {kind}, got shape {w.shape}.")
    K = w.shape[-1]
    if there:
        if kind in (ROW, LOSSLESS):
            raise ValueError(f"[quantize] {kind} is made on the host alone.")
        rows = w.reshape(math.prod(w.shape[:-1]), K)
        blocks = w.device.empty((rows.shape[0], K // values * size), np.uint8)
        return _written(kind, w.shape, blocks, w.device.table.quantize(blocks, rows, type_id))
    if kind == LOSSLESS:
        return _lossless(w)
    x = np.ascontiguousarray(w.reshape(math.prod(w.shape[:-1]), K), np.float32)
    if kind == ROW:
        columns = columns_of(x) if columns is None else columns
        return QuantizedArray(kind, w.shape, _row_blocks(x / columns), columns=columns)
    blocks = np.empty((x.shape[0], K // values * size), np.uint8)
    return _written(kind, w.shape, blocks, _C.quantize(blocks, x, type_id))


def _lossless(w: NDArray[Any]) -> QuantizedArray:
    if w.ndim != 2:
        raise ValueError(f"[quantize] w must be (out, in) for {LOSSLESS}, got shape {w.shape}.")
    packed = lossless.compress(np.ascontiguousarray(w, np.float32 if w.dtype == np.float16 else w.dtype))
    if packed is None:
        raise ValueError(f"[quantize] the exponents of w, {w.shape}, are too many to be packed without loss.")
    return QuantizedArray(LOSSLESS, w.shape, packed)


def _written(kind: str, shape: tuple[int, ...], blocks: Any, bad: int) -> QuantizedArray:
    if bad >= 0:
        raise ValueError(f"[quantize] every number must be finite and its block's scale at most 65504, row {bad} has others.")
    return QuantizedArray(kind, shape, blocks)


def _row_blocks(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """x (R, K) -> (R, 4 + K): each row's scale and its codes in [-127, 127], ties to even."""
    largest = np.abs(x).max(axis=1, keepdims=True, initial=0.0)
    bad = np.flatnonzero(~np.isfinite(largest[:, 0]))
    if bad.size:
        raise ValueError(f"[quantize] every number must be finite, row {bad[0]} has others.")
    live = largest >= np.float32(2.0**-100)
    safe = np.where(live, largest, np.float32(1))
    blocks = np.empty((x.shape[0], x.shape[1] + 4), np.uint8)
    blocks[:, :4] = np.where(live, safe / np.float32(127), np.float32(0)).view(np.uint8)
    codes = np.rint(np.where(live, x, np.float32(0)) * (np.float32(127) / safe))
    blocks[:, 4:] = codes.astype(np.int8).view(np.uint8)
    return blocks


def columns_of(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """What w (R, K) is divided by, column by column, before its rows are rounded to Q8_ROW: the root of the column's root-mean-square over
    their mean. A row's few large weights stand in the same columns as its neighbours'."""
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.sqrt(np.mean(np.square(w, dtype=np.float64), axis=0)) if len(w) else np.ones(w.shape[1])
        mean = size.mean() if size.size else 1.0
    if not (np.isfinite(mean) and mean > 0):
        return np.ones(w.shape[1], np.float32)  # zeros, or what _row_blocks refuses
    found: NDArray[np.float32] = np.sqrt(np.maximum(size / mean, 1e-3)).astype(np.float32)
    return found


def _rows(blocks: NDArray[np.uint8], columns: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Rows of Q8_ROW as float32."""
    scales = np.ascontiguousarray(blocks[:, :4]).view(np.float32)
    w: NDArray[np.float32] = blocks[:, 4:].view(np.int8) * scales
    return w if columns is None else w * columns


def _empty(shape: tuple[int, int]) -> NDArray[np.float32]:
    if shape[0] * shape[1] * 4 < _POOLED:
        return np.empty(shape, np.float32)
    w: NDArray[np.float32] = _C.empty(shape, np.dtype(np.float32))
    return w
