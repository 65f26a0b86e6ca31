"""tools/gpu_build.py as a module, and which layers of proof the GPU's kernels have here."""

from __future__ import annotations

import importlib.util
import os
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


def toolkit() -> Path | None:
    """The folder that has cuda.h: of nvcc, or where CMakeLists.txt looks for it."""
    found = gpu_build().nvcc()
    places = [Path(os.environ.get("CUDA_HOME", "/nowhere")), Path("/usr/local/cuda"), Path("/usr")]
    places += [Path(found).resolve().parent.parent] if found else []
    return next((p / "include" for p in places if (p / "include/cuda.h").exists()), None)


def layers() -> dict[str, str]:
    """Each layer that works without a GPU -> why it must be skipped here, or ""."""
    no_triton = "" if importlib.util.find_spec("triton") else "triton is not installed"
    no_nvcc = "" if gpu_build().nvcc() else "there is no nvcc"
    no_driver = "" if importlib.util.find_spec("fastlm._cuda") else "fastlm._cuda was built without a CUDA toolkit"
    return {
        "Triton's interpreter": no_triton,
        "emulated CUDA C++": "" if shutil.which("g++") else "there is no g++",
        "ahead-of-time compilation": "; ".join(filter(None, (no_nvcc, no_triton))),
        "stand-in driver": no_driver or ("" if toolkit() else "there is no cuda.h"),
    }
