"""What `fastlm._C` is for the CPU: an object with the kernels' functions, by the same names and with the same arguments.

`kernels/<op>/<op>_gpu.py` has them: the host's side of both twins. Each gets a `Gpu` first, through which it launches.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.cuda.array import BFLOAT16, DeviceArray
from fastlm.cuda.recording import recorder
from fastlm.cuda.runtime import Device

KERNELS = (Path(__file__).parent.parent / "kernels").resolve()
TYPES = {
    **{np.dtype(n): t for n, t in (("float32", "fp32"), ("float64", "fp64"), ("uint8", "u8"), ("uint64", "u64"))},
    **{np.dtype(n): t for n, t in (("int8", "i8"), ("int32", "i32"), ("int64", "i64"))},
    BFLOAT16: "bf16",
}
TWINS = ("cuda", "triton")


@cache
def chosen() -> dict[str, str]:
    """What FASTLM_KERNEL says: "layer_norm:triton,matmul:cuda", or "triton" for all."""
    choice: dict[str, str] = {}
    for part in filter(None, os.environ.get("FASTLM_KERNEL", "").split(",")):
        op, _, twin = part.rpartition(":")
        if twin not in TWINS:
            raise ValueError(
                f"FASTLM_KERNEL must be like layer_norm:triton or triton, with one of {', '.join(TWINS)}, got {part!r}."
            )
        choice[op or "*"] = twin
    return choice


class Gpu:
    """How the host's side of an operation launches its kernels."""

    def __init__(self, device: Device, op: str) -> None:
        self.device, self.op = device, op
        self.empty, self.zeros = device.empty, device.zeros

    @property
    def twin(self) -> str:
        """The twin to use: FASTLM_KERNEL's choice, else CUDA C++ where the operation and this build have one."""
        choice = chosen()
        twin = choice.get(self.op, choice.get("*", self.device.twin))
        return twin if (KERNELS / self.op / f"{self.op}_cuda.cu").exists() or twin == "triton" else "triton"

    def triton(
        self,
        kernel: str,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        *,
        plain: tuple[str, ...] = (),
        warps: int = 4,
        stages: int = 3,
        fused: bool = True,
        **constants: Any,
    ) -> None:
        """Launches a Triton kernel. arguments: by name, in its order; arrays, None, whole numbers (int32), floats (float32).

        A whole number that is a multiple of 16 gets a variant of its own, as in Triton's JIT, but for the `plain` ones, where
        that gains nothing; so does None. Every form that may come here must be listed by variants() in <op>_triton.py. Pointers
        must be multiples of 16. fused: whether the compiler may make multiply-adds of products and sums.
        """
        types: dict[str, str | None] = {}
        values: list[Any] = []
        for name, value in arguments.items():
            types[name] = _type(name, value, name in plain)
            if value is not None:
                values.append(value)
        options = {"num_warps": warps, "num_stages": stages} | ({} if fused else {"enable_fp_fusion": False})
        run = self.device.triton(self.op, kernel, types, constants, options)
        pointers = [v.pointer if isinstance(v, DeviceArray) else v for v in values]
        self.device.launch(run, _three(grid), pointers, kernel)

    def cuda(
        self, kernel: str, grid: tuple[int, ...], block: int, arguments: list[Any], *, shared: int = 0, cluster: int = 1
    ) -> None:
        """Launches an entry point of <op>_cuda.cu. arguments: arrays or None, int (int32), np.int64, float, bytes (a tensor map)."""
        letters = "".join(map(_letter, arguments))
        run = self.device.cuda(self.op, kernel, letters, block, shared, cluster)
        values = [v.pointer if isinstance(v, DeviceArray) else 0 if v is None else v for v in arguments]
        self.device.launch(run, _three(grid), values, kernel)


def _type(name: str, value: Any, plain: bool) -> str | None:
    if isinstance(value, DeviceArray):
        if value.pointer % 16:
            raise ValueError(f"[cuda] {name} must begin at a multiple of 16 bytes: pass a copy.")
        return "*" + TYPES[value.dtype]
    if value is None:
        return None
    if isinstance(value, float):
        return "fp32"
    return "i32:16" if value % 16 == 0 and not plain else "i32"


def _letter(value: Any) -> str:
    if value is None or isinstance(value, DeviceArray):
        return "p"
    if isinstance(value, bytes):
        return "t"
    if isinstance(value, float):
        return "f"
    return "l" if isinstance(value, np.int64) else "i"


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


@cache
def functions() -> dict[str, tuple[str, Any]]:
    """Every function of every <op>_gpu.py: name -> (operation, function)."""
    found: dict[str, tuple[str, Any]] = {}
    for path in sorted(KERNELS.glob("*/*_gpu.py")):
        op = path.parent.name
        module = importlib.import_module(f"fastlm.kernels.{op}.{op}_gpu")
        found |= {name: (op, f) for name, f in vars(module).items() if callable(f) and not name.startswith("_")}
    return found


class NoKernel(NotImplementedError, AttributeError):
    """An operation has no kernel for the GPU."""


class Table:
    """`device.table.layer_norm_forward(...)`; the functions are bound to the device at first use."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        if name not in functions():
            raise NoKernel(f"[cuda] there is no kernel {name} for the GPU yet.")
        op, function = functions()[name]
        gpu, device = Gpu(self._device, op), self._device

        def bound(*arguments: Any, **named: Any) -> Any:
            for i, a in enumerate(arguments):
                if isinstance(a, np.ndarray) or (isinstance(a, DeviceArray) and a.device is not device):
                    raise TypeError(_elsewhere(op, [*signature(function).parameters][i + 1], a, device))
            if (by := recorder()) is not None:
                by.keep(arguments)
            return function(gpu, *arguments, **named)

        setattr(self, name, bound)
        return bound


def _elsewhere(op: str, name: str, x: Any, device: Device) -> str:
    """Nothing is copied between devices by itself."""
    where = "the host" if isinstance(x, np.ndarray) else x.device.name
    return (
        f"[{op}] {name} is on {where}, the other arrays are on {device.name}: put it there with fastlm.backend.put({name}, device)."
    )
