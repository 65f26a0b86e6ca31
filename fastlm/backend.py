"""Devices, memory, threads and instruction sets: the one place that talks to `fastlm._C` about the machine."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastlm import _C

Array: TypeAlias = NDArray[Any]

_POOLED = 1 << 16  # bytes; below this malloc is as good and cheaper


def empty(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
    """An uninitialised C-contiguous array; a large one reuses memory that an earlier array gave back."""
    dt = np.dtype(dtype)
    n = dt.itemsize
    for size in shape:
        n *= size
    if n < _POOLED:
        return np.empty(shape, dt)
    return _C.empty(shape, dt)


def zeros(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
    """As `empty`, filled with zeros."""
    a = empty(shape, dtype)
    a.fill(0)
    return a


def num_threads() -> int:
    """Threads that kernels use: FASTLM_NUM_THREADS, else the CPUs that affinity and the cgroup quota leave."""
    return _C.num_threads()


def set_num_threads(n: int) -> None:
    """Sets the number of threads, 1 to 1024. Results do not depend on it, bit for bit."""
    _C.set_num_threads(n)


def isa() -> str:
    """The instruction set in use: scalar, avx2, avx512 or neon. FASTLM_ISA chooses another at import."""
    return _C.isa()
