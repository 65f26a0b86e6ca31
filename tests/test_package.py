"""The package as a whole: what it imports, how long that takes, and that its version is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import fastlm

ROOT = Path(__file__).parent.parent
FOREIGN = ("torch", "transformers", "jax", "tensorflow", "llama_cpp", "triton")


def child(code: str) -> str:
    """What a fresh interpreter prints, run from another directory."""
    env = {**os.environ, "PYTHONPATH": str(Path(fastlm.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_every_module_imports_without_another_framework():
    code = f"""
import importlib, json, pkgutil, sys
class Watch:  # sees an attempt even where the framework is not installed
    seen = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FOREIGN!r}:
            self.seen.append(name)
sys.meta_path.insert(0, Watch())
import fastlm
for m in pkgutil.walk_packages(fastlm.__path__, "fastlm."):
    if not m.name.startswith(("fastlm.benchmarks", "fastlm.kernels", "fastlm.__main__", "fastlm.cuda.interpreter")):
        importlib.import_module(m.name)
print(json.dumps(Watch.seen))
"""
    assert json.loads(child(code)) == []


def test_installing_needs_no_gpu_tools():
    """`pip install .` asks for neither nvcc nor triton: the GPU's kernels are compiled by make wheel-gpu alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = " ".join(project["build-system"]["requires"] + project["project"]["dependencies"])
    assert "triton" not in needed
    assert "nvidia" not in needed
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "enable_language(CUDA" not in cmake
    assert "if(FASTLM_CUDA_INCLUDE" in cmake  # the header is looked for, not required


def test_import_is_quick():
    """At most 0.2 s, the best of five fresh interpreters."""
    code = "import time; start = time.perf_counter(); import fastlm; print(time.perf_counter() - start)"
    assert min(float(child(code)) for _ in range(5)) <= 0.2


def test_one_version():
    assert fastlm.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
