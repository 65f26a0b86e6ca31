"""The benchmark measures what it says: answers are checked, every operation has its file, a line holds what a reader needs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from fastlm import _C
from fastlm.benchmarks import harness, worker
from fastlm.benchmarks.harness import Row


def test_every_operation_has_a_benchmark():
    assert set(_C.ops) - {"roof"} <= set(harness.operations())
    for op in harness.operations():
        assert worker.cases(op), op
        assert callable(worker.bench(op).work), op


def test_a_row_and_its_record(monkeypatch):
    monkeypatch.delenv("FASTLM_PEERS_PYTHON", raising=False)
    rows = list(harness.run(["rms_norm"], threads=1, quick=True))
    assert [r.backward for r in rows] == [False, True, False, True]
    for row in rows:
        assert "ours" not in row.problems
        assert "numpy" not in row.problems
        assert row.ratio("numpy") > 0
        assert row.share > 0
        record = json.loads(json.dumps(row.record({})))
        assert record["threads"] == 1
        assert record["isa"] == _C.isa()
        assert set(record["ms"]) >= {"ours", "numpy"}
        assert "rms_norm" in harness.line(row, ["numpy", "torch"])
        assert harness.line(row, ["llama_cpp"]).rstrip().endswith("-"), "an absent peer is a dash"


@pytest.mark.parametrize(
    ("exact", "ours", "peer", "wrong"),
    [
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.01], set()),
        ([1.0, 2.0], [1.0, 2.001], [1.0, 2.0], {"ours"}),
        ([1.0, 2.0], [1.0, np.nan], [1.0, 3.0], {"ours", "torch"}),
        ([1.0, np.inf], [1.0, np.inf], [1.0, 2.0], {"torch"}),
        ([1, 2], [1, 3], [1, 3], {"ours"}),  # tokens of a peer may part
        ([1.0, 2.0], [1.0], [1.0, 2.0], {"ours"}),
    ],
)
def test_wrong_answers_are_seen(tmp_path, exact, ours, peer, wrong):
    for who, values in (("exact", exact), ("ours", ours), ("torch", peer)):
        np.savez(tmp_path / f"{who}.npz", **{"0": np.array(values)})
    row = Row("op", "case", False, 1)
    harness.check(row, tmp_path, ["ours", "numpy", "torch"], "exact")
    assert set(row.problems) == wrong


def test_share_of_the_roof():
    roof = {"gflops": 100.0, "read_gbs": 10.0, "copy_gbs": 10.0, str(1 << 16): 80.0, str(1 << 28): 10.0}
    compute = Row("op", "case", False, 1, {"ours": [0.02]}, (1e9, 1e6), roof=roof)  # 10 ms at best
    assert compute.share == pytest.approx(0.5)
    memory = Row("op", "case", False, 1, {"ours": [0.2]}, (1e6, 1e9), roof=roof)  # 100 ms at best
    assert memory.share == pytest.approx(0.5)
    cached = Row("op", "case", False, 1, {"ours": [1e-6]}, (1.0, 8e4), roof=roof)
    assert cached.share == pytest.approx(1.0)


def test_a_worker_says_what_went_wrong():
    contestant = harness.Contestant("ours", sys.executable, 1)
    assert "no_such_op" in contestant.ask("prepare", op="no_such_op", index=0, backward=False, result="x")["error"]
    contestant.process.kill()
    contestant.process.wait()
    assert "ended" in contestant.ask("roof")["error"]
    contestant.close()
