"""Gated activation on the GPU, the host's side: the functions of csrc/bind/gated.cpp."""

from __future__ import annotations

from typing import Any

from fastlm.cuda.array import floor16 as _floor16

BLOCK = 1024  # columns of a program


def gated_forward(gpu: Any, y: Any, gate: Any, up: Any, kind: int) -> None:
    _launch(gpu, "gated_forward", {"y": y, "gate": gate, "up": up}, kind, ("gate", "up"))


def gated_backward(gpu: Any, dgate: Any, dup: Any, dy: Any, gate: Any, up: Any, kind: int) -> None:
    arrays = {"dgate": dgate, "dup": dup, "dy": dy, "gate": gate, "up": up}
    _launch(gpu, "gated_backward", arrays, kind, ("dgate", "dup", "gate", "up"))


def _launch(gpu: Any, kernel: str, arrays: dict[str, Any], kind: int, strided: tuple[str, ...]) -> None:
    F = arrays["gate"].shape[-1]
    rows = arrays["gate"].size // F if F else 0
    numbers = {"F": F}
    for name in strided:
        x = arrays[name]
        arrays[name], numbers[f"{name}_first"] = _floor16(x)
        numbers[f"{name}_stride"] = F if x.contiguous else x.strides[-2] // x.dtype.itemsize
    plain = ("kind",) if all(n % 16 == 0 for n in numbers.values()) else (*numbers, "kind")
    gpu.triton(kernel, (rows * -(-F // BLOCK),), arrays | numbers | {"kind": kind}, plain=plain, BLOCK=BLOCK)
