"""Devices, memory, threads and instruction sets: the one place that talks to `fastlm._C` about the machine."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastlm import _C

Array: TypeAlias = NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")

_POOLED = 1 << 16  # bytes; below this malloc is as good and cheaper


_FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": _FLOAT32, "bfloat16": BFLOAT16}


def kernels(x: Any) -> Any:
    """The kernels for arrays like x: `fastlm._C`, or those of the device that x is on, by the same names."""
    return _C if isinstance(x, np.ndarray) else x.device.table


def on_device(x: Any) -> bool:
    """Whether x is an array in a device's memory."""
    return not isinstance(x, np.ndarray) and hasattr(x, "__dlpack_device__") and hasattr(x, "pointer")


def device(name: Any) -> Any:
    """The device of that name: None for "cpu", the GPU for "cuda"; a device is itself. RuntimeError says why there is no GPU."""
    if name is None or name == "cpu":
        return None
    if name == "cuda":
        from fastlm.cuda import device as gpu

        return gpu()
    if hasattr(name, "put") and hasattr(name, "table"):
        return name
    raise ValueError(f"[device] device must be 'cpu' or 'cuda', got {name!r}.")


def device_of(x: Any) -> Any:
    """Where an array is: None for the host, else its device."""
    return getattr(x, "device", None) if not isinstance(x, np.ndarray) else None


def put(x: Any, where: Any) -> Any:
    """x on `where`, a device, its name, or None for the host: x itself where it is there already, else a copy. None stays None."""
    target = device(where)
    if x is None or device_of(x) is target:
        return x
    host = x if isinstance(x, np.ndarray) else x.numpy()
    return host if target is None else target.put(host)


def host(x: Any) -> Array:
    """x as a NumPy array: itself, or a copy of what is on a device, which is waited for."""
    array: Array = x if isinstance(x, np.ndarray) else x.numpy()
    return array


def empty_like(x: Any, shape: tuple[int, ...] | None = None) -> Array:
    """An uninitialised array with x's dtype, where x is, of x's or another shape."""
    return empty(x.shape if shape is None else shape, x.dtype, like=x)


def contiguous(x: Any) -> Array:
    """x, or a C-contiguous copy where it is."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x)
    there: Array = x if x.contiguous else x.copy()
    return there


def empty(shape: tuple[int, ...], dtype: DTypeLike = _FLOAT32, like: Any = None) -> Array:
    """An uninitialised C-contiguous array, where `like` is; a large one reuses memory that an earlier array gave back."""
    if like is not None and not isinstance(like, np.ndarray):
        there: Array = like.device.empty(shape, dtype)
        return there
    dt = _FLOAT32 if dtype is _FLOAT32 else np.dtype(dtype)  # np.dtype(dtype) costs more than the rest
    n = dt.itemsize
    for size in shape:
        n *= size
    if n < _POOLED and not _recorders:
        return np.empty(shape, dt)
    array: Array = _C.empty(shape, dt)
    if _recorders and _thread.spoils:
        array.view(np.uint8).fill(0xFF)
    return array


def lasting(size: int) -> Array:
    """As `empty`, (size,) uint8, for what is made at its first use and kept, also while a step is recorded: not the recording's memory."""
    if not recording():
        return empty((size,), np.uint8)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def zeros(shape: tuple[int, ...], dtype: DTypeLike = np.float32, like: Any = None) -> Array:
    """As `empty`, filled with zeros."""
    if like is not None and not isinstance(like, np.ndarray):
        there: Array = like.device.zeros(shape, dtype)
        return there
    a = empty(shape, dtype)
    if recording():
        _C.zero(a)  # in every run
    else:
        a.fill(0)
    return a


_numbers = np.arange(1024, dtype=np.int32)


def numbers(count: int) -> Array:
    """0 .. count - 1, int32, in memory that lasts and is not to be written to: recorded steps may read it."""
    global _numbers
    if count > len(_numbers):
        _numbers = np.arange(2 * count, dtype=np.int32)
    found: Array = _numbers[:count]
    return found


def memory() -> dict[str, int]:
    """Bytes of the arrays that `empty` made, small ones left out: live, peak (the most at once since reset_peak), held for reuse.

    What was held for ten seconds without being needed goes back to the system by itself; `release` gives all of it back at once.
    """
    return {"live": _C.live_bytes(), "peak": _C.peak_bytes(), "held": _C.cached_bytes()}


def reset_peak() -> None:
    """The peak of `memory` starts anew from what is live."""
    _C.reset_peak()


def release() -> None:
    """What is held for reuse goes back to the system."""
    _C.release_cached()


def ones_like(x: Any) -> Array:
    """Ones of x's shape, float32, where x is."""
    ones = np.ones(x.shape, np.float32)
    there: Array = ones if isinstance(x, np.ndarray) else x.device.put(ones)
    return there


def copy(x: Any) -> Array:
    """A C-contiguous copy of x, where x is."""
    if recording() and isinstance(x, np.ndarray) and x.dtype == np.float32 and x.flags.c_contiguous:
        again = empty(x.shape)
        _C.scale_add(again, x, 1.0, False)
        return again
    there: Array = np.array(x, order="C") if isinstance(x, np.ndarray) else x.copy()
    return there


def add(x: Any, y: Any, out: Any = None) -> Array:
    """x + y of one shape, into `out` or a new array."""
    if isinstance(x, np.ndarray):
        if out is None:
            out = empty(x.shape, x.dtype)
        total: Array = out
        plain = x.flags.c_contiguous and y.flags.c_contiguous and x.dtype == y.dtype == np.float32
        if plain and recording():
            _C.add(total, y, x)
            return total
        if plain and out is x and x.size >= _POOLED // 4:
            _C.scale_add(x, y, 1.0, True)  # the same sum, on all threads
            return total
        np.add(x, y, out=total)
        return total
    out = empty_like(x) if out is None else out
    kernels(x).add(out, contiguous(x), contiguous(y))
    there: Array = out
    return there


def assign(to: Any, source: Any) -> None:
    """to[...] = source, of one shape and dtype, both on one device or both on the host; any strides."""
    if isinstance(to, np.ndarray):
        to[...] = source
    else:
        to.device.assign(to, source)


def rows_of(x: Any, rows: Any, used: int | None = None) -> Any:
    """x[rows] where x is; rows is a slice, then a view, or an array of numbers, then new memory. used: how much of axis 1 is copied on a
    device, all of it where None."""
    if isinstance(x, np.ndarray) or isinstance(rows, slice):
        return x[rows]
    new = empty_like(x, (len(rows), *x.shape[1:]))
    for i, row in enumerate(rows):
        assign(new[i, :used] if used is not None else new[i], x[int(row), :used] if used is not None else x[int(row)])
    return new


def repeated(x: Any, shape: tuple[int, ...]) -> Array:
    """A device's x repeated to `shape`, as NumPy broadcasts, in memory of its own."""
    out: Any = empty_like(x, shape)
    kernels(x).add_broadcast(out, x, zeros((1,), like=x))
    array: Array = out
    return array


def sum_to(x: Any, shape: tuple[int, ...], dtype: DTypeLike = _FLOAT32) -> Array:
    """A device's x summed over the axes along which an array of `shape` was repeated to x's shape."""
    out = empty(shape, dtype, like=x)
    kernels(x).sum_to(out, x)
    return out


def cast(x: Any, dtype: DTypeLike) -> Array:
    """A device's x in float32 or bfloat16: itself where it is."""
    if x.dtype == dtype:
        same: Array = x
        return same
    out = empty(x.shape, dtype, like=x)
    kernels(x).scale_add(out, contiguous(x), 1.0, False)
    return out


class Unrecordable(Exception):
    """Why a step cannot be run again without Python."""


class _Thread(threading.local):
    plan: Any = None  # of C++, or a device
    turned: dict[tuple[int, ...], tuple[Array, list[Array]]] | None = None  # of the recording, where it keeps such
    spoils = False  # `empty` gives nan


_thread = _Thread()
_recorders = 0  # threads that record now; where there are any, `empty` asks the machine which memory to use
_lock = threading.Lock()


def recording() -> bool:
    """Whether this thread records."""
    return _recorders > 0 and _thread.plan is not None


class Recording:
    """Calls `step` once, as it is, and keeps what its kernels did: `run()` does it again, in C++, on the same memory.

    What changes from one run to the next is read from arrays that outlive the step: ids, a cache and its lengths. What the kernels of
    the step computed, `result` too, is in memory of the recording and is overwritten by each run. Between kernels nothing is seen:
    a step that computes with NumPy on what changes must be found out by running it twice (fastlm/generate/recorded.py).

    turned: products of one row read transposed copies of their float32 weights, in which the numbers that are multiplied together lie
    side by side; `refresh` makes them anew from weights that have changed.

    Raises Unrecordable where an operation cannot be recorded, or an array that a kernel reads was made by the step outside the
    recording's memory (so it would be frozen). The step's own exceptions are passed on.
    """

    def __init__(self, step: Callable[[], Any], turned: bool = False) -> None:
        global _recorders
        plan = _C.Plan()
        plan.begin()
        with _lock:
            _recorders += 1
        _thread.plan = plan
        _thread.turned = {} if turned else None
        try:
            self.result = step()
        finally:
            arrays = plan.end()
            self._turned = list((_thread.turned or {}).values())
            _thread.plan = _thread.turned = None
            with _lock:
                _recorders -= 1
        if plan.refused:
            raise Unrecordable(plan.refused)
        self._plan, self.threads = plan, num_threads()
        roots = {id(root): weakref.ref(root) for root in map(_root, arrays)}
        arrays.clear()
        self._owners = [root() for root in roots.values()]
        if any(owner is None for owner in self._owners):
            raise Unrecordable("a kernel reads an array that the step made without a kernel")

    def run(self) -> None:
        """The kernels again, in the order recorded. The GIL is released."""
        self._plan.run()

    def run_on(self, found: Array, ids: Array, ends: Array, seconds: float) -> int:
        """As many runs as `found` (N, B) int32 has rows, no new one once `seconds` have passed; after each its row gets the B ids, of
        which one below 0 or among `ends` makes this run the last. Returns how many were made."""
        return int(self._plan.run_on(found, ids, ends, seconds))

    def refresh(self) -> None:
        """Copies of weights that the recording reads are made anew."""
        if self._turned:
            _C.turn([copy for copy, _ in self._turned], [weights for _, weights in self._turned])

    def spoil(self) -> None:
        """Overwrites the recording's own memory, with nan where it held floats: what no kernel writes before it is read will show."""
        self._plan.spoil()

    def profile(self, rounds: int = 20) -> list[tuple[str, float]]:
        """Name and shortest time in seconds of each kernel, over `rounds` runs; what the runs write is changed by them."""
        return list(zip(self._plan.names(), self._plan.time(rounds), strict=True))

    @property
    def nbytes(self) -> int:
        """The recording's own memory."""
        return int(self._plan.bytes)

    def __len__(self) -> int:
        return len(self._plan)


def deferred(step: Callable[[], T], spoil: bool = False) -> T:
    """step(), with its kernels put off until it has returned: they then run one after another in C++, without the GIL.

    For a step of many kernels on much data, between which Python's own code and data would be read anew from memory, and threads would
    wait for each other's Python. The step may compute with NumPy, but not with what kernels give or read of it: where `spoil` is set,
    all that `empty` gives is nan before the kernels run, to show that. Arrays in the result hold all of the step's memory.

    Raises Unrecordable where an operation cannot be put off, RuntimeError where this thread records already. The step's own exceptions
    are passed on.
    """
    global _recorders
    plan = _C.Plan()
    plan.begin(True)
    with _lock:
        _recorders += 1
    _thread.plan, _thread.spoils = plan, spoil
    try:
        result = step()
    except Exception as e:
        if plan.refused:
            raise Unrecordable(plan.refused) from e
        raise
    finally:
        arrays = plan.end()
        _thread.plan, _thread.spoils = None, False
        with _lock:
            _recorders -= 1
    if spoil:
        plan.spoil()
    plan.run()
    arrays.clear()  # what the kernels read had to live until now
    return result


def turned(weights: list[Array]) -> Array | None:
    """The transposes of float32 weights (N_i, K) side by side, (K, sum of N_i), where this thread's recording keeps such; else None."""
    kept = _thread.turned
    if kept is None:
        return None
    key = tuple(map(id, weights))
    if key not in kept:
        K = weights[0].shape[1]
        copy = lasting(4 * K * sum(w.shape[0] for w in weights)).view(np.float32).reshape(K, -1)
        kept[key] = copy, weights
        _C.turn([copy], [weights])
    return kept[key][0]


def record(step: Callable[[], Any], device: Any = None) -> Any:
    """A Recording of the step; on a device, one of its launches (fastlm/cuda/recording.py), with the same methods."""
    global _recorders
    if device is None:
        return Recording(step)
    from fastlm.cuda.recording import Recording as OnDevice

    with _lock:
        _recorders += 1
    _thread.plan = device
    try:
        made = OnDevice(device, step)
    finally:
        _thread.plan = None
        with _lock:
            _recorders -= 1
    if made.refused:
        raise Unrecordable(made.refused)
    return made


def _root(array: Array) -> Array:
    """The array that owns the memory, or that holds what owns it."""
    return array.base if isinstance(array.base, np.ndarray) else array


def num_threads() -> int:
    """Threads that kernels use: FASTLM_NUM_THREADS, else the CPUs that affinity and the cgroup quota leave."""
    return _C.num_threads()


def set_num_threads(n: int) -> None:
    """Sets the number of threads, 1 to 1024. Results do not depend on it, bit for bit."""
    _C.set_num_threads(n)


def each(f: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """[f(item) for item in items], as many at a time as there are threads, each on one thread from its first kernel to its last.

    For parts that do not need each other: what a thread has computed is read again from its own cache, and nobody waits at the end of
    a kernel. The results have the same bits. What f raises is raised here.
    """
    count = min(num_threads(), len(items))
    if count < 2:
        return [f(item) for item in items]

    def alone(item: T) -> R:
        _C.compute_alone(True)
        return f(item)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(alone, items))


def isa() -> str:
    """The instruction set in use: scalar, avx2, avx512 or neon. FASTLM_ISA chooses another at import."""
    return _C.isa()


_roofs: dict[tuple[str, int], dict[str, float]] = {}


def roof() -> dict[str, float]:
    """This machine's ceilings with the instruction set and the threads in use, measured once per process (about 0.3 s).

    gflops: float32 multiply-adds from registers, 10^9 operations a second. read_gbs: reading memory, 10^9 bytes a second.
    copy_gbs: copying memory, bytes read + bytes written. int8_gops: dot products of bytes from registers, int8_scaled_gops: with a
    scale for every 32 of them, as quantised weights have. fast_gflops: what `gflops` allows of products by the fast inner product, which
    needs 11 multiply-adds for 16 terms; equal to it where there is none.
    """
    key = isa(), num_threads()
    if key not in _roofs:
        _roofs[key] = measure_roof()
    return dict(_roofs[key])


def measure_roof(bytes: int = 1 << 28) -> dict[str, float]:
    """As `roof`, measured anew."""

    def best(f: Callable[[], Any], seconds: float = 0.08) -> float:
        f()
        shortest, until = float("inf"), time.perf_counter() + seconds
        while (start := time.perf_counter()) < until:
            f()
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    pieces = np.empty(8 * num_threads(), np.float32)
    rounds = 20_000  # 1 to 10 ms: waking the threads does not count
    flops = _C.roof_fma(pieces, rounds)
    gflops = flops / best(lambda: _C.roof_fma(pieces, rounds)) / 1e9

    def int8(scaled: bool) -> float:
        return _C.roof_int8(pieces, rounds // 10, scaled) / best(lambda: _C.roof_int8(pieces, rounds // 10, scaled), 0.04) / 1e9

    x = np.full(bytes // 8, 1.0, np.float32)  # half of `bytes` for the source, half for the copy; more than any last cache here
    y = np.full_like(x, 0.0)
    sums = np.empty(-(-x.size // _C.roof_piece), np.float32)
    read_gbs = x.nbytes / best(lambda: _C.roof_read(sums, x)) / 1e9
    copy_gbs = 2 * x.nbytes / best(lambda: _C.roof_copy(y, x)) / 1e9
    return {"gflops": gflops, "read_gbs": read_gbs, "copy_gbs": copy_gbs} | {
        "int8_gops": int8(False),
        "int8_scaled_gops": int8(True),
        "fast_gflops": gflops * (_C.fast_inner_product_gain if _C.has_fast_inner_product() else 1.0),
    }
