"""A step on the device, done again without Python: its launches as a graph. What `backend.Recording` is for the CPU.

The step runs once as it is, while what it launches is kept; its arrays lie in the recording's own memory, where a block is used again as
soon as Python drops the array, as it will be in every run. Then the launches are captured: on the GPU as a CUDA graph, on the
emulated device as the list itself. What crosses between host and device within the step is refused: it would be frozen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastlm.cuda.array import DeviceArray

if TYPE_CHECKING:
    from fastlm.cuda.runtime import Device


class _Thread(threading.local):
    recorder: Recording | None = None


_thread = _Thread()


def recorder() -> Recording | None:
    """What this thread's launches are kept by; None where it does not record."""
    return _thread.recorder


class _Piece:
    """A block of a recording's memory, which goes back to it with the last array in it."""

    def __init__(self, arena: _Arena, block: Any) -> None:
        self.arena, self.block, self.pointer = arena, block, block.pointer

    def __del__(self) -> None:
        self.arena.free.append(self.block)


class _Arena:
    """The memory of what a step makes."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.blocks: list[list[Any]] = []  # block, bytes, whether it held floats only
        self.free: list[Any] = []

    def take(self, bytes: int, floats: bool) -> _Piece:
        """The smallest free block that is large enough and not much too large, else a new one."""
        sizes = {id(entry[0]): entry for entry in self.blocks}
        fits = [b for b in self.free if bytes <= sizes[id(b)][1] <= 2 * bytes + 256]
        if fits:
            block = min(fits, key=lambda b: int(sizes[id(b)][1]))
            self.free.remove(block)
            sizes[id(block)][2] &= floats
            return _Piece(self, block)
        block = self.device.block(bytes)
        self.blocks.append([block, bytes, floats])
        return _Piece(self, block)


class Recording:
    """See `backend.Recording`. `refused`: why the step cannot be run again; "" where it can."""

    threads = 0  # of the host: none is asked for

    def __init__(self, device: Device, step: Callable[[], Any]) -> None:
        if _thread.recorder is not None:
            raise RuntimeError("[cuda] this thread records already.")
        self._device, self._arena = device, _Arena(device)
        self._steps: list[tuple[Callable[..., None], tuple[Any, ...], str]] = []
        self._kept: dict[int, Any] = {}  # the memory of arrays that launches refer to
        self.refused = ""
        _thread.recorder = self
        try:
            self.result = step()
        finally:
            _thread.recorder = None
        self._graph: Callable[[], None] | None = None
        if not self.refused:
            self._graph = device.graph([(f, arguments) for f, arguments, _ in self._steps])

    def block(self, bytes: int, floats: bool) -> Any:
        """Memory for an array that the step makes."""
        return self._arena.take(bytes, floats)

    def add(self, f: Callable[..., None], arguments: tuple[Any, ...], name: str = "copy") -> None:
        """f(*arguments) was done."""
        self._steps.append((f, arguments, name))

    def keep(self, arguments: Sequence[Any]) -> None:
        """The memory of these arrays stays, as long as the recording does."""
        for a in arguments:
            if isinstance(a, DeviceArray):
                if not isinstance(a.owner, _Piece):  # the arena stays anyway
                    self._kept[id(a.owner)] = a.owner
            elif isinstance(a, (list, tuple)):
                self.keep(a)

    def refuse(self, reason: str) -> None:
        """Something was done that cannot be recorded; the first reason stays."""
        self.refused = self.refused or reason

    def run(self) -> None:
        """What was launched, again, in its order. Nothing waits for it."""
        assert self._graph is not None
        self._graph()

    def spoil(self) -> None:
        """Overwrites the recording's own memory, with nan where it held floats: what no kernel writes before it is read will show."""
        for block, bytes, floats in self._arena.blocks:
            self._device.fill(block.pointer, 0xFF if floats else 0, bytes)

    def profile(self, rounds: int = 20) -> list[tuple[str, float]]:
        """Name and shortest time in seconds of each launch, over `rounds` runs, the host's part with it; what the runs write changes."""
        best = [float("inf")] * len(self._steps)
        for _ in range(rounds):
            for i, (f, arguments, _name) in enumerate(self._steps):
                start = time.perf_counter()
                f(*arguments)
                self._device.synchronize()
                best[i] = min(best[i], time.perf_counter() - start)
        return [(name, t) for (_, _, name), t in zip(self._steps, best, strict=True)]

    @property
    def nbytes(self) -> int:
        """The recording's own memory."""
        return sum(int(bytes) for _, bytes, _ in self._arena.blocks)

    def __len__(self) -> int:
        return len(self._steps)
