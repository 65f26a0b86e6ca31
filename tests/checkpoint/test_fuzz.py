"""Thousands of mutated files, in child processes with a limit on memory and time: they load, or raise a typed error.

"json" and "folder" are configurations, read alone and with their weights; "model" is a GGUF file up to the logits.
"""

from __future__ import annotations

import pytest

from tools import fuzz_checkpoint

COUNTS = {"gguf": 2000, "safetensors": 2000, "json": 2000, "folder": 1000, "model": 1000, "index": 500, "llama2c": 500}


@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_mutated(kind, count):
    report = fuzz_checkpoint.run(kind, count)
    assert not report.failures, "\n".join(report.failures)
    assert report.loaded + report.refused == count
    # Both ends are exercised: mutations that are noticed, and files that load in spite of them.
    assert report.refused > count // 10
    assert report.loaded > count // 20


def test_faults_are_caught():
    """A crash, a hang, 320 MB too many and a wrong error: the harness reports each and goes on."""
    report = fuzz_checkpoint.run("fault", len(fuzz_checkpoint.FAULTS), jobs=1)
    reasons = "\n".join(report.failures)
    assert len(report.failures) == 4, reasons
    for i, reason in enumerate(("SEGV", "SIGPROF", "MemoryError", "KeyError")):
        assert report.failures[i].startswith(f"fault {i}: ")
        assert reason in report.failures[i]
