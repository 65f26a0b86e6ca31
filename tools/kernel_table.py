"""Writes kernels/README.md: for each operation which kernels it has, and where its GPU twins were proven. --check only compares.

A twin counts as verified on a card where a committed benchmarks/results/gpu-*.json (tools/gpu_check) says that it passed there with
the sources that it has now.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import gpu_sources  # noqa: E402

KERNELS = ROOT / "kernels"
TABLE = KERNELS / "README.md"
HEADER = """# Kernels

Written by `tools/kernel_table.py`. *gpu-verified (card, commit)*: the twin passed its operation's cases there, `tools/gpu_check`. *emulated
only*: it passes them on the emulated device (CUDA C++ as fibers, Triton by its interpreter) and compiles within its budget. *of others*:
the operation is made of other operations' kernels. *matmul's*: on a device the weight lies as it was, and is multiplied by those twins.

| operation | CPU | CUDA C++ | Triton |
|---|---|---|---|
"""


ELSEWHERE = {"fast_inner_product": "matmul's", "lossless_matmul": "matmul's"}  # a form for the host alone: whose twins do its work


def sources(op: str, twin: str) -> str:
    """A short hash of the files that make up a twin: its kernels with what they include or import, and the host's side."""
    folder = KERNELS / op
    kernels = gpu_sources.cuda(folder / f"{op}_cuda.cu") if twin == "cuda" else gpu_sources.triton(folder / f"{op}_triton.py")
    files = [*kernels, *gpu_sources.triton(folder / f"{op}_gpu.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in dict.fromkeys(files))).hexdigest()[:12]


def results(folder: Path) -> list[dict[str, Any]]:
    """The committed results of tools/gpu_check on real devices, oldest first."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("gpu-*.json"))]
    return sorted((r for r in found if not r.get("dry_run")), key=lambda r: str(r.get("date", "")))


def state(op: str, twin: str, found: list[dict[str, Any]]) -> str:
    """What the table says of a twin that exists."""
    says = "emulated only"
    for result in found:
        kernel = result.get("kernels", {}).get(f"{op}:{twin}")
        if kernel is None:
            continue
        passed = kernel["passed"] and kernel["sources"] == sources(op, twin)
        says = f"gpu-verified ({result['card']}, {result['commit']})" if passed else "emulated only"
    return says


def table(folder: Path = ROOT / "benchmarks/results") -> str:
    found = results(folder)
    lines = []
    for path in sorted(p for p in KERNELS.iterdir() if p.is_dir() and (p / "README.md").exists()):
        op = path.name
        cpu = "yes" if any(path.glob("*_cpu.cpp")) else "none"
        twins = {"cuda": path / f"{op}_cuda.cu", "triton": path / f"{op}_triton.py"}
        said = [state(op, twin, found) if file.exists() else ELSEWHERE.get(op, "none") for twin, file in twins.items()]
        row = [cpu, *said]
        lines.append(f"| [{op}]({op}/README.md) | {' | '.join(row if row != ['none'] * 3 else ['of others'] * 3)} |")
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TABLE.write_text(table())
    elif not TABLE.exists() or TABLE.read_text() != table():
        sys.exit("kernels/README.md does not match the kernels: make kernel-table")
