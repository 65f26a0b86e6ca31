"""Prints what pyproject.toml asks for, one requirement a line; with --hash, a short hash of that list."""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path


def requirements() -> list[str]:
    """The build requirements, the dependencies, the optional ones, and the two tools that `make dev` calls directly."""
    data = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    optional = data["project"]["optional-dependencies"]
    listed = [
        *data["build-system"]["requires"],
        *data["project"]["dependencies"],
        *(r for group in optional.values() for r in group),
    ]
    return sorted({*listed, "cmake>=3.24", "ninja>=1.11"})


if __name__ == "__main__":
    text = "\n".join(requirements()) + "\n"
    if "--hash" in sys.argv:
        print(hashlib.sha256((text + sys.version).encode()).hexdigest()[:12])
    else:
        print(text, end="")
