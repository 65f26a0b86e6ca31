"""Triton's interpreter on plain memory, without torch, and with bfloat16 put right. For tests; written for Triton 3.6 and later.

The stock interpreter computes with the raw bits of bfloat16 and truncates where it converts to it. Here the conversion rounds to
nearest even, products are taken of widened values, and any other arithmetic on bfloat16 is refused: kernels say
`.to(tl.float32)` first. Import this module before any kernel: it sets TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError(
        "triton was imported without its interpreter: import fastlm.cuda.interpreter first, or set TRITON_INTERPRET=1"
    )
os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_NAMES = {
    "fp32": "float32",
    "fp64": "float64",
    "bf16": "bfloat16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u64": "uint64",
    "i8": "int8",
}


class _DType(str):
    """What the interpreter asks of a tensor's dtype: its name."""

    __slots__ = ()


class _Tensor:
    """What the interpreter needs to take a pointer for a tensor's; it works on the memory itself."""

    def __init__(self, pointer: int, name: str) -> None:
        self.pointer, self.dtype = pointer, _DType(name)

    def data_ptr(self) -> int:
        return self.pointer

    def untyped_storage(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def copy_(self, other: Any) -> None:
        pass

    def new_empty(self, *_: Any, **__: Any) -> _Tensor:
        return _Tensor(self.pointer, self.dtype)

    def set_(self, *_: Any) -> _Tensor:
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return (1,)

    def stride(self) -> tuple[int, ...]:
        return (1,)


def tensor(pointer: int, type: str) -> _Tensor:
    """type: "*fp32", "*bf16", ..."""
    return _Tensor(pointer, _NAMES[type[1:]])


def narrow(x: NDArray[Any]) -> NDArray[Any]:
    """float32 -> bfloat16 as uint16, to nearest even, nan stays nan."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def widen(x: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 as uint16 -> float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def _patch() -> None:
    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle

    def up(t: Any) -> Any:
        return handle(widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t

    def plain(t: Any) -> Any:
        return handle(np.ascontiguousarray(up(t).data), up(t).dtype)

    dot = builder.create_dot  # of contiguous operands: then a b and the transposed b' a' are summed in one order, as on a GPU
    builder.create_dot = lambda self, a, b, d, *rest: dot(self, plain(a), plain(b), d, *rest)
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, type: Any) -> Any:
        s, t = source.dtype.scalar, type.scalar
        if s == t:
            return cast(self, source, type)
        if t == tl.bfloat16:
            wide = source if s == tl.float32 else cast(self, source, tl.float32)
            return handle(narrow(wide.data), tl.bfloat16)
        if s == tl.bfloat16:
            return up(source) if t == tl.float32 else cast(self, up(source), type)
        return cast(self, source, type)

    builder.cast_impl = cast_impl

    def guard(f: Any) -> Any:
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            for a in args:
                if isinstance(a, handle) and a.dtype.scalar == tl.bfloat16:
                    raise TypeError("arithmetic on bfloat16: say .to(tl.float32) first")
            found = f(self, *args, **kwargs)
            # A comparison's result keeps its operands' type there: repeated into a block it would be no mask.
            return handle(found.data, tl.int1) if found.data.dtype == np.bool_ else found

        return checked

    for name in ("binary_op", "unary_op"):
        setattr(builder, name, guard(getattr(builder, name)))
    reduce: Any = interpreter.ReduceScanOpInterface
    check = reduce.check_tensor

    def check_tensor(self: Any, inputs: Any) -> Any:
        for a in inputs:
            if isinstance(a, tl.core.tensor) and a.dtype == tl.bfloat16:
                raise TypeError("reduction of bfloat16: say .to(tl.float32) first")
        return check(self, inputs)

    reduce.check_tensor = check_tensor
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is not None:  # 3.6 turns one-element arrays into numbers in a way that NumPy 2.4 no longer allows

        def patch_lang_tensor(tensor: Any, *scope: Any) -> Any:
            found = patch(tensor, *scope)
            tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
            return found

        interpreter._patch_lang_tensor = patch_lang_tensor
    replaced: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function that a kernel calls. The stock one replaces the language's parts again in each call, which takes most of the time:
        the launch did that for kernels, and for the language's own functions once is enough, since it is never undone."""
        home = self.fn.__module__
        if home.startswith("triton.") and home not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(home)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


_patch()
