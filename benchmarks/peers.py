"""Which libraries can be compared with, and in which interpreter: this one, and the one that FASTLM_PEERS_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PEERS = ("torch", "transformers", "llama_cpp")
_ASK = """
import importlib.metadata as m, importlib.util as u, json
names = {"numpy": "numpy", "torch": "torch", "transformers": "transformers", "llama_cpp": "llama_cpp_python"}
print(json.dumps({k: m.version(v) for k, v in names.items() if u.find_spec(k)}))
"""


def installed(python: str) -> dict[str, str]:
    """The versions of the peers that an interpreter has; empty where it does not start."""
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def find() -> dict[str, tuple[str, str]]:
    """{peer: (interpreter, version)}. NumPy is always this interpreter's."""
    here = installed(sys.executable)
    found = {"numpy": (sys.executable, here["numpy"])}
    other = os.environ.get("FASTLM_PEERS_PYTHON")
    for python, versions in ((sys.executable, here), (other, installed(other) if other else {})):
        for peer in PEERS:
            if python and peer in versions and peer not in found:
                found[peer] = (python, versions[peer])
    return found
