"""Which libraries can be compared with, and in which interpreter: this one, and the one that FASTLM_PEERS_PYTHON names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = ("torch", "torch_compile", "transformers", "ctranslate2", "onnxruntime", "openvino", "llama_cpp", "ik_llama")
_ASK = """
import importlib.metadata as m, importlib.util as u, json
names = {k: k for k in ("numpy", "torch", "transformers", "ctranslate2", "onnxruntime", "openvino")} | {"llama_cpp": "llama_cpp_python"}
print(json.dumps({k: m.version(v) for k, v in names.items() if u.find_spec(k)}))
"""


def installed(python: str) -> dict[str, str]:
    """The versions of the peers that an interpreter has; empty where it does not start."""
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=600, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    versions: dict[str, str] = json.loads(done.stdout)
    if "torch" in versions:
        versions["torch_compile"] = versions["torch"]
    return versions


def ik_llama() -> str | None:
    """The commit of ik_llama.cpp that the folder FASTLM_IK_LLAMA was built from, where its library says so; None where it is absent."""
    folder = os.environ.get("FASTLM_IK_LLAMA")
    if not folder or not (Path(folder) / "llama-bench").exists():
        return None
    found = re.search(rb"\0([0-9a-f]{9})\0", (Path(folder) / "llama-bench").read_bytes())
    return found.group(1).decode() if found else "unknown"


def find(wanted: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
    """{peer: (interpreter, version)}, of those `wanted` if any are. NumPy is always this interpreter's."""
    here = installed(sys.executable)
    found = {"numpy": (sys.executable, here["numpy"])}
    other = os.environ.get("FASTLM_PEERS_PYTHON")
    for python, versions in ((sys.executable, here), (other, installed(other) if other else {})):
        for peer in PEERS:
            if python and peer in versions and peer not in found:
                found[peer] = (python, versions[peer])
    found["dense"] = (sys.executable, "fastlm")  # an operation of ours that does the same work in a plainer way
    if version := ik_llama():
        found["ik_llama"] = (sys.executable, version)
    return {who: where for who, where in found.items() if not wanted or who in wanted}
