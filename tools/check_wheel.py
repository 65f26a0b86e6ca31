"""Installs a wheel into a fresh virtual environment and tries it from another directory.

python tools/check_wheel.py dist/fastlm-*.whl
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LARGEST = 10_000_000  # bytes
SLOWEST = 0.2  # seconds to import
TRY = """
import sys, time
start = time.perf_counter()
import fastlm
seconds = time.perf_counter() - start
import numpy as np
from fastlm import ops, testing
assert "site-packages" in fastlm.__file__, fastlm.__file__
for op in ("layer_norm", "matmul"):
    case = testing.cases(op)[0]
    testing.check_forward(op, getattr(ops, op), case)
assert "torch" not in sys.modules
print(seconds)
"""


def main(wheel: Path) -> int:
    problems = []
    size = wheel.stat().st_size
    if size > LARGEST:
        problems.append(f"the wheel has {size:,} bytes, at most {LARGEST:,} are allowed")
    names = zipfile.ZipFile(wheel).namelist()
    problems += [f"{n} does not belong into the wheel" for n in names if n.endswith((".cpp", ".h", ".cu", ".jsonl", ".pyc"))]
    problems += [f"{n} is outside of fastlm/" for n in names if not n.startswith(("fastlm/", "fastlm-"))]
    for needed in ("fastlm/py.typed", "fastlm/_C.pyi", "fastlm/kernels/matmul/matmul_ref.py", "fastlm/benchmarks/worker.py"):
        if needed not in names:
            problems.append(f"{needed} is missing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv/bin/python"
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel.resolve()], check=True)

        def run(*command: str | Path) -> str:
            return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

        seconds = min(float(run(python, "-c", TRY)) for _ in range(5))
        if seconds > SLOWEST:
            problems.append(f"importing takes {seconds:.2f} s, at most {SLOWEST} are allowed")
        command = folder / "venv/bin/fastlm"
        if "layer_norm" not in run(command, "info") or "matmul" not in run(command, "bench", "--list"):
            problems.append("the command line does not name the operations")
        run(command, "bench", "layer_norm", "--quick", "--json", folder / "bench.jsonl")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{wheel.name}: {size / 1e6:.2f} MB, imported in {seconds:.3f} s" + ("" if problems else ", all well"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
