"""Device: memory, copies and launches. `device()` is the GPU; `emulated.Emulated` is the same interface on the host, for tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastlm.cuda.array import DeviceArray
from fastlm.cuda.recording import recorder

Run = Callable[[tuple[int, int, int], Sequence[Any]], None]


class Device:
    """What a device must be able to do. Work is queued on one stream, in order."""

    name = "device"
    stream = 0
    dlpack = (2, 0)  # DLPack's type and number of the device
    shared_memory = 227 << 10  # bytes that one block may have
    twin = "cuda"  # of an operation that has both, where FASTLM_KERNEL says nothing

    def block(self, bytes: int) -> Any:
        """Memory with `.pointer`, aligned to 256 bytes, freed with its last reference."""
        raise NotImplementedError

    def _copy_in(self, to: int, source: NDArray[Any]) -> None:
        raise NotImplementedError

    def _copy_out(self, to: NDArray[Any], source: int) -> None:
        raise NotImplementedError

    def _copy_2d(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        raise NotImplementedError

    def _fill(self, pointer: int, byte: int, bytes: int) -> None:
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError

    def memory(self) -> int:
        """Bytes that were in use at once, at most; 0 where that is not counted."""
        return 0

    def graph(self, steps: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> Callable[[], None]:
        """What does all of these in one call: launches, copies and fills as they were recorded."""
        raise NotImplementedError

    def triton(self, op: str, kernel: str, types: dict[str, str | None], constants: dict[str, Any], options: dict[str, int]) -> Run:
        """The compiled variant of a Triton kernel: called with the grid and the arguments whose type is not None."""
        raise NotImplementedError

    def cuda(self, op: str, kernel: str, signature: str, block: int, shared: int, cluster: int) -> Run:
        """An entry point of a CUDA C++ file."""
        raise NotImplementedError

    def tensor_map(self, pointer: int, rows: int, columns: int, row_bytes: int, box_rows: int, box_columns: int) -> bytes:
        """A matrix of bfloat16 for TMA, and the box that one copy takes: an argument of a kernel."""
        raise NotImplementedError

    # --- what follows from these ---

    def launch(self, run: Run, grid: tuple[int, int, int], arguments: Sequence[Any], name: str) -> None:
        """run(grid, arguments), kept where this thread records."""
        run(grid, arguments)
        if (by := recorder()) is not None:
            by.add(run, (grid, arguments), name)

    def copy_in(self, to: int, source: NDArray[Any]) -> None:
        """From the host; returns when `source` may be changed."""
        if (by := recorder()) is not None:
            by.refuse("the step copies from the host to the device")
        self._copy_in(to, source)

    def copy_out(self, to: NDArray[Any], source: int) -> None:
        """To the host; returns when it is there."""
        if (by := recorder()) is not None:
            by.refuse("the step reads what is on the device")
        self._copy_out(to, source)

    def copy_2d(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """`rows` rows of `width` bytes, within the device."""
        self._copy_2d(to, to_pitch, source, source_pitch, width, rows)
        if (by := recorder()) is not None:
            by.add(self._copy_2d, (to, to_pitch, source, source_pitch, width, rows), "copy")

    def fill(self, pointer: int, byte: int, bytes: int) -> None:
        """Every byte of this memory."""
        self._fill(pointer, byte, bytes)
        if (by := recorder()) is not None:
            by.add(self._fill, (pointer, byte, bytes), "fill")

    @cached_property
    def table(self) -> Any:
        """The kernels for its arrays, by the names of `fastlm._C`."""
        from fastlm.cuda.table import Table

        return Table(self)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """An uninitialised array."""
        dt, n = np.dtype(dtype), 1
        for k in shape:
            n *= k
        by = recorder()
        block = self.block(n * dt.itemsize) if by is None else by.block(n * dt.itemsize, dt.kind in "fV")
        return DeviceArray(self, tuple(shape), dt, block.pointer, block)

    @cached_property
    def _numbers(self) -> dict[int, DeviceArray]:
        return {}

    def numbers(self, n: int) -> DeviceArray:
        """0 .. n - 1, int32, made once: not to be written to."""
        if n not in self._numbers:
            self._numbers[n] = self.constant(np.arange(n, dtype=np.int32))
        return self._numbers[n]

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """As `empty`, filled with zeros."""
        a = self.empty(shape, dtype)
        self.fill(a.pointer, 0, a.nbytes)
        return a

    def put(self, x: NDArray[Any]) -> DeviceArray:
        """A copy of a NumPy array on the device."""
        a = self.empty(x.shape, x.dtype)
        self.copy_in(a.pointer, np.ascontiguousarray(x))
        return a

    def constant(self, x: NDArray[Any]) -> DeviceArray:
        """As `put`, for what never changes, such as a table of addresses: a recorded step may make it."""
        block = self.block(x.nbytes)
        self._copy_in(block.pointer, np.ascontiguousarray(x))
        a = DeviceArray(self, x.shape, x.dtype, block.pointer, block)
        self.keep(a)
        return a

    def keep(self, *arrays: DeviceArray) -> None:
        """Where this thread records, these arrays' memory stays as long as the recording does."""
        if (by := recorder()) is not None:
            by.keep(arrays)

    def assign(self, to: DeviceArray, source: DeviceArray) -> None:
        """to[...] = source: equal shapes and dtypes, any strides whose last axes are contiguous."""
        if to.shape != source.shape or to.dtype != source.dtype:
            raise ValueError(f"[cuda] cannot copy {source.shape} {source.dtype} into {to.shape} {to.dtype}.")
        if not to.size:
            return
        if (by := recorder()) is not None:
            by.keep((to, source))
        _assign(self, to, source)


def _assign(device: Device, to: DeviceArray, source: DeviceArray) -> None:
    """Rows that are contiguous in both are copied by one two-dimensional copy for every pair of the two axes before them."""
    shape, inner = to.shape, to.dtype.itemsize
    axis = len(shape)
    while axis and (shape[axis - 1] == 1 or to.strides[axis - 1] == source.strides[axis - 1] == inner):
        inner *= shape[axis - 1]
        axis -= 1
    if axis == 0:
        device.copy_2d(to.pointer, inner, source.pointer, inner, inner, 1)
        return
    for lead in np.ndindex(shape[: axis - 1]):
        a = to.pointer + sum(i * s for i, s in zip(lead, to.strides, strict=False))
        b = source.pointer + sum(i * s for i, s in zip(lead, source.strides, strict=False))
        device.copy_2d(a, to.strides[axis - 1], b, source.strides[axis - 1], inner, shape[axis - 1])


class Cuda(Device):
    """The GPU, by the driver."""

    def __init__(self) -> None:
        from fastlm import _cuda

        self._cuda = _cuda
        found = _cuda.properties()
        self.capability: tuple[int, int] = found["capability"]
        self.properties: dict[str, Any] = found
        self.name = str(found["name"])
        self.shared_memory = int(found["shared_memory"])
        self.stream = _cuda.create_stream()
        from fastlm.cuda.images import Images

        self.images = Images(self.capability, _cuda.status()[2])
        if not self.images.count("cuda"):  # built without nvcc, or the driver is too old
            self.twin = "triton"
        self._runs: dict[Any, Run] = {}

    @property
    def multiprocessors(self) -> int:
        return int(self.properties["multiprocessors"])

    def tensor_map(self, pointer: int, rows: int, columns: int, row_bytes: int, box_rows: int, box_columns: int) -> bytes:
        made: bytes = self._cuda.tensor_map(pointer, rows, columns, row_bytes, box_rows, box_columns)
        return made

    def block(self, bytes: int) -> Any:
        return self._cuda.Block(bytes, self.stream)

    def _copy_in(self, to: int, source: NDArray[Any]) -> None:
        self._cuda.copy_in(to, source.view(np.uint8).reshape(-1) if source.dtype.kind == "V" else source, self.stream)

    def _copy_out(self, to: NDArray[Any], source: int) -> None:
        self._cuda.copy_out(to.view(np.uint8) if to.dtype.kind == "V" else to, source, self.stream)

    def _copy_2d(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        if rows == 1 or to_pitch == source_pitch == width:
            self._cuda.copy(to, source, width * rows, self.stream)
        else:
            self._cuda.copy_2d(to, to_pitch, source, source_pitch, width, rows, self.stream)

    def _fill(self, pointer: int, byte: int, bytes: int) -> None:
        self._cuda.fill(pointer, byte, bytes, self.stream)

    def synchronize(self) -> None:
        self._cuda.synchronize(self.stream)

    def memory(self) -> int:
        return int(self._cuda.memory()[1])  # the pool gives nothing back

    def graph(self, steps: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> Callable[[], None]:
        self._cuda.begin_capture(self.stream)
        try:
            for f, arguments in steps:
                f(*arguments)
        finally:
            captured = self._cuda.end_capture(self.stream)
        stream = self.stream
        return lambda: captured.launch(stream)

    def triton(self, op: str, kernel: str, types: dict[str, str | None], constants: dict[str, Any], options: dict[str, int]) -> Run:
        from fastlm.cuda.images import variant

        key = variant(kernel, types, constants, options)
        run = self._runs.get(key)
        if run is None:
            entry = self.images.find(op, "triton", key)
            launch = self._cuda.Kernel(
                self._cuda.Module(self.images.image(entry)),
                entry["entry"],
                entry["signature"] + "pp",
                entry["block"],
                entry["shared"],
            )
            stream = self.stream

            def run(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
                launch(grid, stream, *arguments, 0, 0)  # Triton's kernels end with two scratch pointers that ours do not use

            self._runs[key] = run
        return run

    def cuda(self, op: str, kernel: str, signature: str, block: int, shared: int, cluster: int) -> Run:
        key = kernel, block, shared, cluster
        run = self._runs.get(key)
        if run is None:
            entry = self.images.find(op, "cuda", kernel)
            launch = self._cuda.Kernel(self.images.module(entry, self._cuda.Module), kernel, signature, block, shared, cluster)
            stream = self.stream

            def run(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
                launch(grid, stream, *arguments)

            self._runs[key] = run
        return run


_device: Device | None = None


def status() -> tuple[bool, str]:
    """Whether a GPU can be used; why not, or what it is."""
    try:
        cuda: Any = importlib.import_module("fastlm._cuda")
    except ImportError:
        return False, "this build has no GPU part: it was built where no CUDA toolkit is."
    usable, why, version = cuda.status()
    if not usable:
        return False, why
    found = cuda.properties()
    return True, (
        f"{found['name']}, compute capability {found['capability'][0]}.{found['capability'][1]}, "
        f"{found['memory'] / 2**30:.0f} GiB, driver for CUDA {version // 1000}.{version % 1000 // 10}"
    )


def device() -> Device:
    """The device in use. Raises RuntimeError that says why there is none."""
    global _device
    if _device is None:
        usable, why = status()
        if not usable:
            raise RuntimeError(f"[cuda] no GPU can be used: {why}")
        _device = Cuda()
    return _device


def use(other: Device | None) -> None:
    """Makes `other` the device; None: the GPU again, when it is next asked for."""
    global _device
    _device = other
