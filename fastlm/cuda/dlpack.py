"""DLPack (its structs before version 1) and __cuda_array_interface__: arrays to and from other libraries, without a copy."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.cuda.array import BFLOAT16, DeviceArray, contiguous_strides

if TYPE_CHECKING:
    from fastlm.cuda.runtime import Device

_CODES = {"i": 0, "u": 1, "f": 2}  # kDLInt, kDLUInt, kDLFloat
_KINDS = {code: kind for kind, code in _CODES.items()}
_BFLOAT = 4
_NAME, _USED = b"dltensor", b"used_dltensor"


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]

_exported: dict[int, Any] = {}  # address of the struct -> what it refers to, until its reader lets go


def _let_go(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule: int) -> None:
    """A capsule that nobody consumed frees what it carries."""
    if _api.PyCapsule_IsValid(capsule, _NAME):
        get = ctypes.pythonapi["PyCapsule_GetPointer"]  # of a pointer: the capsule is being destroyed
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
        _exported.pop(get(capsule, _NAME), None)


_release, _unread = _Deleter(_let_go), _Destructor(_destroy)


def export(array: DeviceArray) -> Any:
    """A capsule that keeps the array's memory alive until its reader lets go of it."""
    n, size = array.ndim, array.dtype.itemsize
    shape = (ctypes.c_int64 * max(n, 1))(*array.shape)
    strides = (ctypes.c_int64 * max(n, 1))(*(s // size for s in array.strides))
    code = _BFLOAT if array.dtype == BFLOAT16 else _CODES[array.dtype.kind]
    kind, number = array.device.dlpack
    managed = _Managed(_DLTensor(array.pointer, kind, number, n, code, 8 * size, 1, shape, strides, 0), None, _release)
    address = ctypes.addressof(managed)
    _exported[address] = managed, shape, strides, array
    return _api.PyCapsule_New(address, _NAME, ctypes.cast(_unread, ctypes.c_void_p))


class _Owner:
    """Calls the producer's deleter when the last view is gone."""

    def __init__(self, managed: Any) -> None:
        self.managed = managed

    def __del__(self) -> None:
        if self.managed.contents.deleter:
            self.managed.contents.deleter(self.managed)


def accept(x: Any, device: Device) -> DeviceArray:
    """See `fastlm.cuda.from_dlpack`."""
    if isinstance(x, DeviceArray):
        return x
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        where = tuple(int(v) for v in x.__dlpack_device__())
        if where != device.dlpack:
            raise ValueError(
                f"[from_dlpack] x must be on {device.name}, DLPack device {device.dlpack}, got {where}. Copy it there first."
            )
        stream = {"stream": device.stream} if device.dlpack[0] == 2 else {}
        return _read(x.__dlpack__(**stream), device)
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is None:
        raise TypeError(
            f"[from_dlpack] x must be an array on the device with __dlpack__ or __cuda_array_interface__, got {type(x).__name__}."
        )
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = tuple(interface.get("strides") or contiguous_strides(shape, dtype.itemsize))
    return DeviceArray(device, shape, dtype, int(interface["data"][0]), x, strides)


def _read(capsule: Any, device: Device) -> DeviceArray:
    managed = ctypes.cast(_api.PyCapsule_GetPointer(capsule, _NAME), ctypes.POINTER(_Managed))
    _api.PyCapsule_SetName(capsule, _USED)
    owner, t = _Owner(managed), managed.contents.tensor
    if t.code == _BFLOAT and t.bits == 16:
        dtype = BFLOAT16
    elif t.code in _KINDS and t.lanes == 1:
        dtype = np.dtype(f"{_KINDS[t.code]}{t.bits // 8}")
    else:
        raise TypeError(
            f"[from_dlpack] x has a dtype that has no array here: DLPack code {t.code}, {t.bits} bits, {t.lanes} lanes."
        )
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] * dtype.itemsize for i in range(t.ndim)) if t.strides else None
    return DeviceArray(device, shape, dtype, (t.data or 0) + t.byte_offset, owner, strides)
