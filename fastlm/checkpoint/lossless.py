"""float32 and bfloat16 matrices that keep every bit in 7/8 and 3/4 of the bytes: of the first byte, the sign and the exponent's upper
seven bits, 4 bits are stored, as the number of one of the 16 that are most frequent in the matrix; the few weights that have another are
listed beside them. The layout is in kernels/lossless_matmul/lossless_matmul.h. The idea of storing exponents alone in fewer bits: Zhang et
al. 2025, arXiv:2504.11651."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastlm import _C

DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.float32), 2: np.dtype(ml_dtypes.bfloat16)}  # by the bytes of a value
_GROUP, _PANEL = 16, 32  # rows
_ENTRY = np.dtype([("k", np.int32), ("row", np.int32), ("value", np.uint32)])
_LAST = np.iinfo(np.int32).max
_MOST = 1 / 64  # of the weights may be exceptions: they cost 12 bytes each


def compress(w: NDArray[Any]) -> NDArray[np.uint8] | None:
    """w (N, K) float32 or bfloat16 -> its packed bytes, or None where too many first bytes are in use."""
    N, K = w.shape
    size = w.dtype.itemsize
    groups = -(-N // _PANEL) * _PANEL // _GROUP
    counts = np.zeros((groups, 256), np.int32)
    _C.lossless_survey(counts, w)
    chosen = np.sort(np.argsort(-counts.sum(axis=0, dtype=np.int64), kind="stable")[:16])
    lengths = counts.sum(axis=1) - counts[:, chosen].sum(axis=1) + 1
    count = int(lengths.sum(dtype=np.int64))
    if count - groups > w.size * _MOST or count > _LAST or K >= _LAST:
        return None
    first, _, total = _C.lossless_layout(size, N, K, count)
    packed: NDArray[np.uint8] = _C.empty((total,), np.dtype(np.uint8))
    packed[:32].view(np.int64)[:] = size, N, K, count
    packed[32:64] = 0
    packed[64:80], packed[80:128] = chosen, 0
    packed[first:] = 0
    packed[first : first + 4 * (groups + 1)].view(np.int32)[:] = np.concatenate([[0], np.cumsum(lengths)])
    _C.lossless_pack(packed, w)
    return packed


def check(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> np.dtype[Any]:
    """The dtype of the weights. ValueError where these are not the bytes of a matrix of this shape: nothing that the kernels follow is
    taken on trust."""
    N, K = shape if len(shape) == 2 else (-1, -1)
    found = packed[:32].view(np.int64).tolist() if packed.ndim == 1 and packed.size >= 128 else [0] * 4
    size, rows, columns, count = found
    groups = -(-max(N, 0) // _PANEL) * _PANEL // _GROUP
    if size not in DTYPES or (rows, columns) != (N, K) or not groups <= count <= N * K + groups:
        raise ValueError(f"[QuantizedArray] blocks are not those of a matrix {shape} that `quantize` made LOSSLESS.")
    if not _followed(packed, size, N, K, count, groups):
        raise ValueError(f"[QuantizedArray] blocks of a LOSSLESS matrix {shape} are damaged: quantize it again.")
    return DTYPES[size]


def _followed(packed: NDArray[np.uint8], size: int, N: int, K: int, count: int, groups: int) -> bool:
    """Whether each group of rows has its entries within the list, in the order of k and at places that it has."""
    first, entries, total = _C.lossless_layout(size, N, K, count)
    if packed.size != total:
        return False
    at = packed[first : first + 4 * (groups + 1)].view(np.int32)
    if at[0] != 0 or at[-1] != count or not (np.diff(at) > 0).all():
        return False
    listed = packed[entries : entries + _ENTRY.itemsize * count].view(_ENTRY)
    last = np.zeros(count, bool)
    last[at[1:] - 1] = True
    k, row = listed["k"], listed["row"]
    places = (k >= 0) & (k < K) & (row >= 0) & (row < _GROUP)
    return bool(np.where(last, k == _LAST, places).all() and ((np.diff(k) >= 0) | last[:-1]).all())
