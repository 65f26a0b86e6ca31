"""DeviceArray: an n-dimensional array in the memory of a device. It computes nothing itself: operations are kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from fastlm.cuda.runtime import Device

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a C-contiguous array."""
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


class DeviceArray:
    """shape, dtype, strides in bytes, and a pointer into device memory that `owner` keeps.

    Views (reshape, basic slicing) share the memory. Nothing is copied between host and device but by `numpy()` and `Device.put`:
    NumPy functions refuse a DeviceArray.
    """

    __slots__ = ("device", "dtype", "owner", "pointer", "shape", "strides")
    __array_priority__ = 1000
    __array_ufunc__ = None  # NumPy's operators raise instead of copying element by element

    def __init__(
        self,
        device: Device,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        pointer: int,
        owner: Any,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.device, self.shape, self.dtype, self.pointer, self.owner = device, shape, np.dtype(dtype), pointer, owner
        self.strides = contiguous_strides(shape, self.dtype.itemsize) if strides is None else strides

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        n = 1
        for k in self.shape:
            n *= k
        return n

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        step = self.dtype.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != step and self.size:
                return False
            step *= n
        return True

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device.name})"

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError("[cuda] an array on the device is never copied to the host by itself: call .numpy().")

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view with another shape; one size may be -1. The array must be contiguous."""
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        sizes = [int(n) for n in shape]
        if sizes.count(-1) == 1:
            known = 1
            for n in sizes:
                known *= n if n != -1 else 1
            sizes[sizes.index(-1)] = self.size // known if known else 0
        new = tuple(sizes)
        n = 1
        for k in new:
            n *= k
        if n != self.size or min(new, default=0) < 0:
            raise ValueError(f"[reshape] shape must have as many elements as x, {self.size} in {self.shape}, got {tuple(shape)}.")
        if not self.contiguous:
            return self.copy().reshape(new)
        return DeviceArray(self.device, new, self.dtype, self.pointer, self.owner)

    def __getitem__(self, index: Any) -> DeviceArray:
        """A view: integers, slices with positive steps, Ellipsis, None."""
        items = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in items:
            at = items.index(Ellipsis)
            taken = sum(i is not None for i in items) - 1
            items[at : at + 1] = [slice(None)] * (self.ndim - taken)
        shape: list[int] = []
        strides: list[int] = []
        pointer, axis = self.pointer, 0
        for item in items:
            if item is None:
                shape.append(1)
                strides.append(0)
                continue
            if axis >= self.ndim:
                raise IndexError(f"[cuda] an array of {self.ndim} axes has no more to be indexed, got {index!r}.")
            n, stride = self.shape[axis], self.strides[axis]
            if isinstance(item, slice):
                start, stop, step = item.indices(n)
                if step < 1:
                    raise IndexError(f"[cuda] steps must be positive, got {item!r}.")
                count = max(0, -(-(stop - start) // step))
                pointer += start * stride if count else 0
                shape.append(count)
                strides.append(stride * step)
            else:
                i = int(item)
                if not -n <= i < n:
                    raise IndexError(f"[cuda] index must be from {-n} to {n - 1}, got {i}.")
                pointer += (i % n) * stride
            axis += 1
        shape += self.shape[axis:]
        strides += self.strides[axis:]
        return DeviceArray(self.device, tuple(shape), self.dtype, pointer, self.owner, tuple(strides))

    def copy(self) -> DeviceArray:
        """A C-contiguous copy on the device."""
        new = self.device.empty(self.shape, self.dtype)
        self.device.assign(new, self)
        return new

    def numpy(self) -> NDArray[Any]:
        """A copy on the host. Waits for the device."""
        source = self if self.contiguous else self.copy()
        out = np.empty(self.shape, self.dtype)
        self.device.copy_out(out, source.pointer)
        return out

    def item(self) -> Any:
        """The only element, on the host. Waits for the device."""
        return self.numpy().item()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == BFLOAT16:
            raise AttributeError("__cuda_array_interface__ has no bfloat16: use __dlpack__.")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None if self.contiguous else self.strides,
            "stream": self.device.stream or 1,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.dlpack

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        from fastlm.cuda.dlpack import export

        self.device.synchronize()  # whatever stream the reader uses, the elements are there
        return export(self)


def floor16(x: DeviceArray) -> tuple[DeviceArray, int]:
    """x from the multiple of 16 bytes before it, and how many elements lie between: kernels take aligned pointers and an offset."""
    rest = x.pointer % 16
    if not rest:
        return x, 0
    before = DeviceArray(x.device, x.shape, x.dtype, x.pointer - rest, x.owner, x.strides)
    return before, rest // x.dtype.itemsize


def retyped(x: DeviceArray, dtype: DTypeLike) -> DeviceArray:
    """x's memory as an array of one element of another dtype: what stands for an array that a kernel will not read."""
    return DeviceArray(x.device, (1,), dtype, x.pointer, x.owner)


def from_dlpack(x: Any) -> DeviceArray:
    """An array of another library on this device (torch, cupy, jax), without a copy. bfloat16 is carried.

    Raises TypeError for what has neither __dlpack__ nor __cuda_array_interface__, ValueError for another device.
    """
    from fastlm.cuda.dlpack import accept
    from fastlm.cuda.runtime import device

    return accept(x, device())
