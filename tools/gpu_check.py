"""What a GPU machine is asked, in one command and at most ten minutes: are the kernels right there, and how fast are they?

    python tools/gpu_check.py                 build images for this card, test, sanitize, compare with the emulator, measure
    python tools/gpu_check.py --dry-run       every step on the emulated device, in small: proves the script itself
    python tools/gpu_check.py --steps tests kernels     some steps; --commit NAME where there is no git

Each step is a process of its own with a share of the time; one that fails or runs out of it is reported, and the next one begins. The
result goes to benchmarks/results/gpu-<card>-<commit>.json, which tools/kernel_table.py reads once it is committed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SANITIZED = "layer_norm or adamw or cross_entropy or sampling or matmul"  # shared memory, barriers, asynchronous copies
DRY = "(adamw or add) and (3x5 or test_copies)"


class Check:
    """The run of all steps."""

    def __init__(self, dry: bool, seconds: float, out: Path) -> None:
        self.dry, self.out, self.deadline = dry, out, time.monotonic() + seconds
        self.result: dict[str, Any] = {"dry_run": dry, "date": datetime.now(UTC).isoformat(timespec="seconds"), "steps": {}}

    def run(self, step: str, command: list[str], limit: float, **settings: str) -> str:
        """What the command prints; how it ended and how long it took go into the result."""
        limit = min(limit, self.deadline - time.monotonic())
        start = time.monotonic()
        env = os.environ | {"PYTHONPATH": str(ROOT)} | ({"FASTLM_DRY_RUN": "1"} if self.dry else {}) | settings
        env.pop("TRITON_INTERPRET", None)
        said, state = "", "no time was left"
        if limit > 1:
            try:
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
                said, state = done.stdout, "ok" if done.returncode == 0 else f"status {done.returncode}"
                if done.returncode:
                    self.result["steps"].setdefault(step, {})["said"] = (done.stdout + done.stderr)[-2000:]
            except subprocess.TimeoutExpired:
                state = f"stopped after {limit:.0f} s"
        self.result["steps"].setdefault(step, {}).update(state=state, seconds=round(time.monotonic() - start, 1))
        print(f"{step:<12} {state}, {time.monotonic() - start:.1f} s", flush=True)
        return said

    def note(self, step: str, state: str) -> None:
        self.result["steps"][step] = {"state": state}
        print(f"{step:<12} {state}", flush=True)

    # --- the steps ---

    def images(self) -> None:
        """Kernels for this card, by the compilers that are here."""
        if importlib.util.find_spec("triton") is None:
            found = sorted(p.name for p in (ROOT / "fastlm/cuda/images").glob("*.zip"))
            self.note("images", f"no triton: those that are there are used: {', '.join(found) or 'none'}")
            return
        options = ["--ops", "add", "--no-pack"] if self.dry else []
        arch = "90" if self.dry else "".join(map(str, self.capability()))
        self.run("images", [sys.executable, "tools/gpu_build.py", "--archs", arch, *options], 240)

    def tests(self) -> None:
        """tests/gpu/test_device.py; which twins passed all their cases."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu/test_device.py", f"--junitxml={report}"]
            self.run("tests", command + (["-k", DRY] if self.dry else []), 240)
            self.result["kernels"] = verdicts(report.read_text()) if report.exists() else {}
        failed = sorted(k for k, v in self.result["kernels"].items() if not v["passed"])
        print(f"{'':<12} {len(self.result['kernels'])} twins, failed: {', '.join(failed) or 'none'}", flush=True)

    def sanitizer(self) -> None:
        """compute-sanitizer over the smallest cases."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            self.note("sanitizer", "compute-sanitizer was not found")
            return
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-x", "tests/gpu/test_device.py", "-k"]
        for kind in ("memcheck", "racecheck"):
            selected = DRY if self.dry else f"({SANITIZED}) and (2x3x48 or 3x5 or 5x1)"
            self.run(f"{kind}", [tool, "--tool", kind, "--error-exitcode", "9", *tests, selected], 60)

    def emulator(self) -> None:
        """The emulated device against this one, on the same inputs."""
        self.measure("emulator", 60)

    def benchmarks(self) -> None:
        """Kernels and their peers."""
        self.measure("kernels", 180)

    def models(self) -> None:
        """Training and decoding, whole."""
        self.measure("models", 150)

    def measure(self, what: str, limit: float) -> None:
        said = self.run(what, [sys.executable, "tools/gpu_bench.py", what], limit)
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        self.result["measured"] = self.result.get("measured", []) + rows
        for row in rows:
            print(f"{'':<12} {line_of(row)}", flush=True)

    # --- what they need ---

    def capability(self) -> tuple[int, int]:
        from fastlm.cuda import device

        found: tuple[int, int] = device().capability  # type: ignore[attr-defined]
        return found

    def write(self, commit: str, card: str) -> Path:
        self.result |= {"commit": commit, "card": card}
        self.out.mkdir(parents=True, exist_ok=True)
        name = "dry-run.json" if self.dry else f"gpu-{re.sub('[^A-Za-z0-9]+', '-', card).strip('-')}-{commit}.json"
        path = self.out / name
        path.write_text(json.dumps(self.result, indent=1) + "\n")
        return path


def verdicts(report: str) -> dict[str, dict[str, Any]]:
    """From pytest's XML: "op:twin" -> whether every case passed, how many there were, the sources' hash."""
    table = load("kernel_table")
    found: dict[str, dict[str, Any]] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        match = re.match(r"test_device\[(\w+)-(cuda|triton)-", case.get("name", ""))
        if match is None or case.find("skipped") is not None:
            continue
        key = f"{match[1]}:{match[2]}"
        entry = found.setdefault(key, {"passed": True, "cases": 0, "sources": table.sources(match[1], match[2])})
        entry["cases"] += 1
        entry["passed"] &= case.find("failure") is None and case.find("error") is None
    return found


def line_of(row: dict[str, Any]) -> str:
    """A measurement as it is printed."""
    parts = [f"{row['name']:<44}"]
    parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in ("name", "kind")]
    return "  ".join(parts)


def load(name: str) -> Any:
    """Another tool as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commit_of() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


STEPS = ("images", "tests", "emulator", "benchmarks", "models", "sanitizer")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--seconds", type=float, default=570.0)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    if arguments.dry_run:
        card = "emulated"
    else:
        from fastlm.cuda import device, status

        usable, why = status()
        if not usable:
            print(f"no GPU can be used: {why}", file=sys.stderr)
            return 2
        card = device().name
    check = Check(arguments.dry_run, arguments.seconds, arguments.out)
    for step in arguments.steps:
        getattr(check, step)()
    path = check.write(arguments.commit or commit_of(), card)
    print(path)
    good = all(s["state"] == "ok" or "not found" in s["state"] or "no triton" in s["state"] for s in check.result["steps"].values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
