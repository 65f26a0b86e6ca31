"""tools/gpu_build.py as a module."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def gpu_build():
    spec = importlib.util.spec_from_file_location("gpu_build", ROOT / "tools/gpu_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
