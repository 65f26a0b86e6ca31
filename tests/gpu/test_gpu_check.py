"""tools/gpu_check.py: every step runs, on the emulated device, and its result says what the table of kernels reads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.gpu.build import ROOT
from tests.gpu.test_kernel_table import load

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_dry_run(tmp_path):
    """All steps end well; no measurement is an error; the tests' verdicts are those of the twins that ran."""
    command = [sys.executable, "tools/gpu_check.py", "--dry-run", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert done.returncode == 0, (result["steps"], done.stderr)
    assert result["dry_run"]
    assert result["commit"] == "abc"
    assert {s["state"] for s in result["steps"].values()} <= {"ok", "compute-sanitizer was not found"}
    assert not [row for row in result["measured"] if "error" in row]
    kinds = [row["kind"] for row in result["measured"]]
    assert kinds.count("kernel") >= 20
    assert kinds.count("model") == 3
    assert kinds.count("emulator") == 1
    adamw = {"passed": True, "cases": 1}
    assert {k: {n: v[n] for n in adamw} for k, v in result["kernels"].items()} == {"adamw:cuda": adamw, "adamw:triton": adamw}


def test_verdicts():
    """A twin passed where all its cases did; skipped ones say nothing."""
    report = """<testsuites><testsuite>
      <testcase name="test_device[layer_norm-cuda-2x3x48]"/><testcase name="test_device[layer_norm-cuda-5x1]"><failure/></testcase>
      <testcase name="test_device[rms_norm-triton-5x1]"/><testcase name="test_device[add-cuda-5]"><skipped/></testcase>
      <testcase name="test_images"/></testsuite></testsuites>"""
    found = load("gpu_check").verdicts(report)
    assert {k: (v["passed"], v["cases"]) for k, v in found.items()} == {"layer_norm:cuda": (False, 2), "rms_norm:triton": (True, 1)}
    assert found["rms_norm:triton"]["sources"] == load("kernel_table").sources("rms_norm", "triton")
