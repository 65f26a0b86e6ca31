"""A device that is the host: Triton kernels run in Triton's interpreter, CUDA C++ kernels as fibers (csrc/cuda/emulator.h).

For tests. Memory is poisoned with nan and has guards around it, so that what reads or writes outside of an array is seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlm.cuda import runtime
from fastlm.cuda.array import DeviceArray
from fastlm.cuda.images import variant
from fastlm.cuda.runtime import Device, Run

GUARD = 256  # bytes before and after every block
POISON = 0xFF  # nan as float32 and bfloat16, -1 as an integer

SCHEDULES = (0, 1, 2)  # 0: threads in their order; else the seed of an order that is shuffled


class Block:
    """Host memory between two guards."""

    def __init__(self, bytes: int) -> None:
        self.memory = np.full(bytes + 2 * GUARD + 255, POISON, np.uint8)
        address = self.memory.__array_interface__["data"][0]
        self.start = -(address + GUARD) % 256 + GUARD
        self.bytes, self.pointer = bytes, address + self.start

    def intact(self) -> bool:
        """Whether nothing wrote into the guards."""
        return bool((self.memory[: self.start] == POISON).all() and (self.memory[self.start + self.bytes :] == POISON).all())

    def __del__(self) -> None:
        if not sys.is_finalizing() and not self.intact():
            Emulated.damaged += 1


def view(pointer: int, bytes: int) -> NDArray[Any]:
    """Memory at an address as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * bytes).from_address(pointer)) if bytes else np.empty(0, np.uint8)


class Emulated(Device):
    """`twin` None: whatever the operation prefers. libraries: where the emulated CUDA C++ is, `<op>.so`."""

    name = "emulated"
    dlpack = (1, 0)
    capability = (9, 0)
    multiprocessors = 3
    damaged = 0  # blocks whose guards were found overwritten, in all

    def __init__(self, libraries: Path | None = None, seed: int = 0) -> None:
        self.libraries, self.seed = libraries, seed
        self.launched: dict[str, set[str]] = {}  # operation -> the variants that were launched
        self._loaded: dict[str, Any] = {}

    def block(self, bytes: int) -> Any:
        return Block(bytes)

    def _copy_in(self, to: int, source: NDArray[Any]) -> None:
        view(to, source.nbytes)[:] = np.ascontiguousarray(source).reshape(-1).view(np.uint8)

    def _copy_out(self, to: NDArray[Any], source: int) -> None:
        to.reshape(-1).view(np.uint8)[:] = view(source, to.nbytes)

    def _copy_2d(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        for r in range(rows):
            view(to + r * to_pitch, width)[:] = view(source + r * source_pitch, width)

    def _fill(self, pointer: int, byte: int, bytes: int) -> None:
        view(pointer, bytes)[:] = byte

    def synchronize(self) -> None:
        pass

    def tensor_map(self, pointer: int, rows: int, columns: int, row_bytes: int, box_rows: int, box_columns: int) -> bytes:
        """As csrc/cuda/ptx_model.h reads it; what the driver would refuse is refused."""
        if pointer % 16 or row_bytes % 16 or not (0 < box_rows <= 256 and 0 < box_columns <= 64):
            raise ValueError("[cuda] a matrix for TMA begins and has rows at multiples of 16 bytes, and boxes of at most 256 rows.")
        return struct.pack("<QQQQII88x", pointer, rows, columns, row_bytes, box_rows, box_columns)

    def graph(self, steps: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> Callable[[], None]:
        def replay() -> None:
            for f, arguments in steps:
                f(*arguments)

        return replay

    def triton(self, op: str, kernel: str, types: dict[str, str | None], constants: dict[str, Any], options: dict[str, int]) -> Run:
        from fastlm.cuda.interpreter import tensor

        self.launched.setdefault(op, set()).add(variant(kernel, types, constants, options))
        function = getattr(importlib.import_module(f"fastlm.kernels.{op}.{op}_triton"), kernel)

        def run(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
            given = iter(arguments)
            values = {
                n: None if t is None else tensor(next(given), t) if t.startswith("*") else next(given) for n, t in types.items()
            }
            if all(grid):
                with np.errstate(all="ignore"):
                    function[grid](**values, **constants)

        return run

    def cuda(self, op: str, kernel: str, signature: str, block: int, shared: int, cluster: int) -> Run:
        if self.libraries is None:
            raise RuntimeError(f"[{op}] no folder with emulated CUDA C++ was given.")
        library = self._loaded.get(op)
        if library is None:
            library = self._loaded[op] = ctypes.CDLL(str(self.libraries / f"{op}.so"))
            library.emulate.restype = ctypes.c_char_p
        letters = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}

        def run(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
            held: list[Any] = [
                ctypes.create_string_buffer(v, 128) if c == "t" else letters[c](v)
                for c, v in zip(signature, arguments, strict=True)
            ]
            pointers = (ctypes.c_void_p * max(len(held), 1))(*(ctypes.addressof(h) for h in held))
            sizes = (ctypes.c_int * 3)(*grid)
            error = library.emulate(
                kernel.encode(), sizes, block, shared, cluster, pointers, len(held), self.seed, signature.encode()
            )
            if error:
                raise RuntimeError(f"[{op}] {kernel}: {error.decode()}")

        self.launched.setdefault(op, set()).add(kernel)
        return run


@contextlib.contextmanager
def emulated(**options: Any) -> Iterator[Emulated]:
    """Inside, the device is an emulated one; `twin` chooses the twin of all operations, `kind` another class of device."""
    twin = options.pop("twin", None)
    kind = options.pop("kind", Emulated)
    before = os.environ.get("FASTLM_KERNEL")
    from fastlm.cuda.table import chosen

    if twin is not None:
        os.environ["FASTLM_KERNEL"] = twin
    chosen.cache_clear()
    on: Emulated = kind(**options)
    runtime.use(on)
    try:
        yield on
    finally:
        runtime.use(None)
        if twin is not None:
            os.environ.pop("FASTLM_KERNEL") if before is None else os.environ.__setitem__("FASTLM_KERNEL", before)
        chosen.cache_clear()


__all__ = ["SCHEDULES", "Block", "DeviceArray", "Emulated", "emulated"]
