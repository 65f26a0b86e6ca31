"""Files mapped into memory, read-only, and arrays over them."""

from __future__ import annotations

import mmap
import os
import stat
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastlm.checkpoint.errors import FormatError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def map_file(path: str | os.PathLike[str], kind: str) -> mmap.mmap:
    """The whole of a regular file, read-only. `kind` names the format in messages.

    Raises FileNotFoundError and the like, FormatError for what is not a regular file or is empty. Whoever truncates the file while
    it is mapped kills the process that reads it (SIGBUS): sizes are checked when the file is opened, and savers rename instead.
    """
    mode = os.stat(path).st_mode  # before open: opening a pipe would wait for its writer
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise FormatError(path, f"expected a {kind} file, got {what}")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError(path, f"expected a {kind} file, got an empty file", 0)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def view(memory: Any, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    """A read-only array over mapped memory, not a copy where `offset` is aligned for the dtype. The caller checked the range."""
    count = 1
    for n in shape:
        count *= n
    if count == 0:
        return np.empty(shape, dtype)
    if offset % dtype.alignment:  # kernels read whole words: a file that is not aligned is copied
        raw = np.frombuffer(memory, np.uint8, count * dtype.itemsize, offset)
        copied = np.empty(count, dtype)
        copied.view(np.uint8)[:] = raw
        return copied.reshape(shape)
    return np.frombuffer(memory, dtype, count, offset).reshape(shape)


def release(array: NDArray[Any]) -> None:
    """Gives back the memory of an array's pages where it lies in a mapped file; they are read again when they are touched."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)
