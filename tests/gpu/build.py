"""tools/gpu_build.py as a module, and which layers of proof the GPU's kernels have here."""

from __future__ import annotations

import importlib.util
import shutil
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def gpu_build():
    spec = importlib.util.spec_from_file_location("gpu_build", ROOT / "tools/gpu_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers() -> dict[str, str]:
    """Each layer that works without a GPU -> why it must be skipped here, or ""."""
    no_triton = "" if importlib.util.find_spec("triton") else "triton is not installed"
    no_nvcc = "" if gpu_build().nvcc() else "there is no nvcc"
    return {
        "Triton's interpreter": no_triton,
        "emulated CUDA C++": "" if shutil.which("g++") else "there is no g++",
        "ahead-of-time compilation": "; ".join(filter(None, (no_nvcc, no_triton))),
        "stand-in driver": "" if importlib.util.find_spec("fastlm._cuda") else "fastlm._cuda was built without a CUDA toolkit",
    }
