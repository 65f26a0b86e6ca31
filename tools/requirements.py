"""Prints what pyproject.toml asks for, one requirement a line; with --hash, a short hash of that list."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tomllib
from pathlib import Path

HERE = {"gpu-test": bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists())}  # groups that only some machines need


def requirements() -> list[str]:
    """The build requirements, the dependencies, the optional ones, and the two tools that `make dev` calls directly.

    What compiles and tests GPU kernels, group gpu-test, is asked for only where nvcc is.
    """
    data = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    optional = data["project"]["optional-dependencies"]
    listed = [
        *data["build-system"]["requires"],
        *data["project"]["dependencies"],
        *(r for name, group in optional.items() if HERE.get(name, True) for r in group),
    ]
    return sorted({*listed, "cmake>=3.24", "ninja>=1.11"})


if __name__ == "__main__":
    text = "\n".join(requirements()) + "\n"
    if "--hash" in sys.argv:
        print(hashlib.sha256((text + sys.version).encode()).hexdigest()[:12])
    else:
        print(text, end="")
