"""Which files a GPU twin is made of: for these tools/gpu_build.py compiles again, and tools/kernel_table.py no longer calls it verified."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def closure(first: Path, refers: Callable[[Path], list[Path]]) -> list[Path]:
    """A file and all that it refers to, as far as they are there."""
    found: set[Path] = set()
    todo = [first]
    while todo:
        file = todo.pop()
        if file not in found and file.exists():
            found.add(file)
            todo += refers(file)
    return sorted(found)


def included(file: Path) -> list[Path]:
    """What a file of C++ includes, beside it or from the root."""
    names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', file.read_text(), re.M)
    return [(place / name).resolve() for name in names for place in (file.parent, ROOT)]


def imported(file: Path) -> list[Path]:
    """What a Python file imports of the kernels."""
    names = re.findall(r"fastlm\.kernels\.(\w+)(?:\.| import )(\w+)", file.read_text())
    return [ROOT / f"kernels/{op}/{name}.py" for op, name in names]


def cuda(source: Path, host: bool = False) -> list[Path]:
    """A file of CUDA C++ with its headers; host: with those of the emulator, which do not reach the device."""
    return [f for f in closure(source, included) if host or f.name not in ("emulator.h", "ptx_model.h")]


def triton(source: Path) -> list[Path]:
    """A file of Triton kernels, or of the host's side, with what it imports."""
    return closure(source, imported)
