"""Writes fastlm/_C.pyi from the built extension module; with --check, says where the two differ.

The module is private and its arguments were checked in fastlm/ops, so arrays are `Any` here: the stub is for names and counts.
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
    match = re.match(rf"{name}\((.*)\) -> (.*)", documentation.splitlines()[0])
    if match is None or "Overloaded" in documentation:
        return f"def {name}(*args: Any, **kwargs: Any) -> Any: ..."
    depth, parts, current = 0, [], ""
    for letter in match[1]:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    parts += [current] if current.strip() else []
    arguments = [re.split(r"[:=]", p.strip())[0].strip() + (" = ..." if "=" in p else "") for p in parts]
    arguments = [re.sub(r"^([a-z_A-Z0-9]+)", r"\1: Any", a) for a in arguments]
    return f"def {name}({', '.join(arguments)}) -> {RESULTS.get(match[2].strip(), 'Any')}: ..."


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
            lines.append(f"class {name}:\n    def __getattr__(self, name: str) -> Any: ...")
        else:
            lines.append(f"{name}: Any")
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        STUB.write_text(stub())
    elif not STUB.exists() or STUB.read_text() != stub():
        sys.exit("fastlm/_C.pyi does not match the extension module: make stubs")
