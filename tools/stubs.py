"""Writes fastlm/_C.pyi from the built extension module; with --check, says where the two differ.

The module is private and its arguments were checked in fastlm/ops, so these are `Any` here: the stub is for names and
results.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from fastlm import _C

STUB = Path(__file__).parent.parent / "fastlm" / "_C.pyi"
HEADER = """# Written by tools/stubs.py (make stubs) from the extension module.
from typing import Any

def __getattr__(name: str) -> Any: ...  # bindings that are newer than this file
"""
RESULTS = {"None": "None", "bool": "bool", "int": "int", "float": "float", "str": "str", "list[str]": "list[str]"}


def function(name: str, documentation: str) -> str:
    """`name(arg0: numpy.ndarray, n: typing.SupportsInt) -> int` as a line of a stub."""
    match = re.match(rf"{name}\(.*\) -> (.*)", documentation.splitlines()[0] if documentation else "")
    result = RESULTS.get(match[1].strip(), "Any") if match else "Any"
    return f"def {name}(*args: Any, **kwargs: Any) -> {result}: ..."


def stub() -> str:
    lines = []
    for name in sorted(n for n in dir(_C) if not n.startswith("__")):
        value = getattr(_C, name)
        if inspect.isroutine(value):
            lines.append(function(name, value.__doc__ or ""))
        elif isinstance(value, (bool, int, float, str)):
            lines.append(f"{name}: {type(value).__name__}")
        elif isinstance(value, tuple):
            lines.append(f"{name}: tuple[str, ...]")
        elif isinstance(value, type):
            base = "(Exception)" if issubclass(value, Exception) else ""
            lines.append(f"class {name}{base}:\n    def __getattr__(self, name: str) -> Any: ...")
        else:
            lines.append(f"{name}: Any")
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        STUB.write_text(stub())
    elif not STUB.exists() or STUB.read_text() != stub():
        sys.exit("fastlm/_C.pyi does not match the extension module: make stubs")
