"""The same cases under pytest-benchmark: `pytest benchmarks/`. Only what this interpreter has: run `fastlm bench` for ratios."""

from __future__ import annotations

import importlib.util

import pytest

from fastlm.benchmarks import harness, worker
from fastlm.testing import case_id

PEERS = [p for p in ("torch",) if importlib.util.find_spec(p)]
CASES = [
    pytest.param(op, i, backward, who, id=f"{op}-{case_id(case)}-{'fb' if backward else 'f'}-{who}")
    for op in harness.operations()
    if not worker.is_model(op)
    for i, case in enumerate(worker.cases(op))
    for backward in worker.passes(op, i)
    for who in ("ours", "numpy", *PEERS)
]


@pytest.mark.parametrize(("op", "index", "backward", "who"), CASES)
def test_speed(benchmark, op, index, backward, who):
    run = worker.contestant(who, op, index, backward)
    if run is None:
        pytest.skip(f"{op} is not compared with {who}")
    benchmark.group = f"{op} {case_id(worker.cases(op)[index])}{' backward' if backward else ''}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
