"""Installs a wheel into a fresh virtual environment and tries it from another directory.

    python tools/check_wheel.py dist/fastlm-*.whl
    python tools/check_wheel.py dist/fastlm-*.whl --gpu 80 90 100 ptx

--gpu: the wheel has kernels for these architectures; every variant that variants() lists is found and loaded by the installed package, on a
stand-in for the driver, and operations launch theirs. Where there is no driver, an old one or no device, `fastlm info` says so. That needs
triton here, and neither triton nor torch there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LARGEST, LARGEST_GPU = 10_000_000, 25_000_000  # bytes
ROOT = Path(__file__).resolve().parent.parent
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


LOAD = """
import json, sys
from fastlm.cuda import device
on, missing = device(), []
names = json.load(open(sys.argv[1]))
for op, twin, key in names:
    try:
        entry = on.images.find(op, twin, key)
        on._cuda.Kernel(on._cuda.Module(on.images.image(entry)), entry["entry"], "p", 32)
    except Exception as e:
        missing.append(f"{key}: {e}")
import numpy as np
from fastlm import ops
x, weight = on.put(np.ones((5, 64), np.float32)), on.put(np.ones((64, 64), np.float32))
ops.layer_norm(ops.linear(x, weight, activation="gelu"), weight[0], weight[1])
assert not {"torch", "triton"} & set(sys.modules)
print(json.dumps([on.images.path.name, missing]))
"""
NONE = [  # settings of the stand-in, and what must be said of them
    ({"FASTLM_LIBCUDA": "/nowhere/libcuda.so.1"}, "none: no NVIDIA driver is installed"),
    ({"STANDIN_DEVICES": "0"}, "none: the driver is there, but no device is usable"),
    ({"STANDIN_VERSION": "11040"}, "none: the driver supports CUDA 11.4; CUDA 12.0 or newer is needed"),
]


def wanted(arch: str) -> list[tuple[str, str, str]]:
    """Operation, twin and name of every compiled kernel that the package may ask for: variants() of Triton's, and what nvcc made here."""
    sys.path.insert(0, str(ROOT))
    from fastlm.cuda.images import FOLDER, variant

    found = []
    for path in sorted((ROOT / "kernels").glob("*/*_triton.py")):
        module = importlib.import_module(f"fastlm.kernels.{path.parent.name}.{path.stem}")
        found += [(path.parent.name, "triton", variant(*v)) for v in module.variants()]
    with zipfile.ZipFile(FOLDER / ("ptx.zip" if arch == "ptx" else f"sm_{arch}.zip")) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    return found + [("", "cuda", name.removeprefix("cuda ")) for name in manifest if name.startswith("cuda ")]


def check_gpu(python: Path, folder: Path, archs: list[str]) -> list[str]:
    """What is wrong with the wheel's GPU kernels; `python` has it installed."""
    include = next(p for p in (Path("/usr/local/cuda/include"), Path("/usr/include")) if (p / "cuda.h").exists())
    driver = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", f"-I{include}", ROOT / "tests/gpu/standin.c", "-o", driver], check=True)
    names = folder / "names.json"
    problems = []
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def info(settings: dict[str, str]) -> str:
        command = [python, "-m", "fastlm", "info"]
        return subprocess.run(command, cwd=folder, env=clean | settings, capture_output=True, text=True).stdout

    for settings, said in NONE:
        if said not in info({"FASTLM_LIBCUDA": str(driver)} | settings):
            problems.append(f"fastlm info does not say {said!r}")
    for arch in archs:
        names.write_text(json.dumps(wanted(arch)))
        # What has no archive of its own, 12.0, takes the portable one.
        major = "12" if arch == "ptx" else str(int(arch) // 10)
        log = folder / f"{arch}.log"
        env = clean | {"FASTLM_LIBCUDA": str(driver), "STANDIN_MAJOR": major, "STANDIN_LOG": str(log)}
        done = subprocess.run([python, "-c", LOAD, names], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"sm_{arch}: {done.stderr[-600:]}")
            continue
        archive, missing = json.loads(done.stdout)
        if archive != ("ptx.zip" if arch == "ptx" else f"sm_{arch}.zip"):
            problems.append(f"sm_{arch}: {archive} was taken")
        problems += [f"sm_{arch}: {m}" for m in missing]
        launched = log.read_text() if log.exists() else ""
        if not all(f"launch {op}" in launched for op in ("matmul", "layer_norm")):
            problems.append(f"sm_{arch}: the operations launched only {launched!r}")
        if f"kernels in {archive}" not in info(env):
            problems.append(f"sm_{arch}: fastlm info does not say which kernels there are")
    return problems


def main(wheel: Path, archs: list[str]) -> int:
    problems = []
    size, largest = wheel.stat().st_size, LARGEST_GPU if archs else LARGEST
    if size > largest:
        problems.append(f"the wheel has {size:,} bytes, at most {largest:,} are allowed")
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
        if "GPU" not in run(command, "info"):
            problems.append("fastlm info does not say whether there is a GPU")
        problems += check_gpu(python, folder, archs) if archs else []
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{wheel.name}: {size / 1e6:.2f} MB, imported in {seconds:.3f} s" + ("" if problems else ", all well"))
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--gpu", nargs="+", default=[], metavar="ARCH")
    given = parser.parse_args()
    sys.exit(main(given.wheel.resolve(), given.gpu))
