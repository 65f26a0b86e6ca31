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
    compute = Row("op", "case", False, 1, {"ours": [0.02]}, work=(1e9, 1e6), roof=roof)  # 10 ms at best
    assert compute.share == pytest.approx(0.5)
    memory = Row("op", "case", False, 1, {"ours": [0.2]}, work=(1e6, 1e9), roof=roof)  # 100 ms at best
    assert memory.share == pytest.approx(0.5)
    cached = Row("op", "case", False, 1, {"ours": [1e-6]}, work=(1.0, 8e4), roof=roof)
    assert cached.share == pytest.approx(1.0)
    cold = Row("op", "case", False, 1, {"ours": [1e-5]}, work=(1.0, 8e4), roof=roof, cold=True)
    assert cold.share == pytest.approx(0.8), "what is too small for memory, but is in no cache"


def test_cold_inputs_take_turns(monkeypatch):
    monkeypatch.setattr(worker, "COLD", 10_000)
    index = next(i for i, case in enumerate(worker.cases("linear")) if case.get("cold") == "weight")
    values = {"x": np.ones(3, np.float32), "weight": np.ones(1000, np.float32)}
    turns = worker.in_turn("linear", index, values, np.array)
    seen = [next(turns) for _ in range(4)]
    assert len({id(v["weight"]) for v in seen[:3]}) == 3, "three copies make 12,000 bytes"
    assert seen[3]["weight"] is seen[0]["weight"]
    assert all(v["x"] is values["x"] for v in seen)
    index = next(i for i, case in enumerate(worker.cases("linear")) if "cold" not in case)
    assert next(worker.in_turn("linear", index, values, np.array)) is values


def test_a_worker_says_what_went_wrong():
    contestant = harness.Contestant("ours", sys.executable, 1)
    assert "no_such_op" in contestant.ask("prepare", op="no_such_op", index=0, backward=False, result="x")["error"]
    contestant.process.kill()
    contestant.process.wait()
    assert "ended" in contestant.ask("roof")["error"]
    contestant.close()


def test_cases_are_selected_by_name():
    names = [harness.label("model", i) for i in harness.selected(["model"], ["gpt2-decode"])["model"]]
    assert names
    assert all(name.startswith("gpt2-decode") for name in names)
    assert list(harness.selected(["rms_norm", "model"], ["t5-small"])) == ["model"]
    with pytest.raises(ValueError, match="no case is called gpt9"):
        harness.selected(["model"], ["gpt9"])


def test_who_takes_part():
    at = {harness.label("model", i): i for i in range(len(worker.cases("model")))}
    assert worker.takes_part("ours", "model", at["t5-small-translate-f32-1"])
    assert worker.takes_part("ctranslate2", "model", at["t5-small-translate-f32-1"])
    assert not worker.takes_part("llama_cpp", "model", at["t5-small-translate-f32-1"])
    assert not worker.takes_part("numpy", "model", at["t5-small-translate-f32-1"])
    assert worker.takes_part("torch", "model", at["gpt-char-train-12-64"])
    assert worker.takes_part("numpy", "rms_norm", 0)


def test_engines_are_checked_against_ours(tmp_path):
    for who, value in (("ours", [[3, 4]]), ("llama_cpp", [[3, 5]]), ("transformers", [[4, 4]])):
        np.savez(tmp_path / f"{who}.npz", **{"0": np.array(value)})
    row = Row("model", "case", False, 1)
    harness.check_engines(row, tmp_path, ["ours", "llama_cpp", "transformers"])
    assert set(row.problems) == {"transformers"}
    np.savez(tmp_path / "ours.npz", **{"0": np.ones((2, 3), np.float32)})
    np.savez(tmp_path / "openvino.npz", **{"0": np.ones((2, 3), np.float32) * 1.001})
    np.savez(tmp_path / "onnxruntime.npz", **{"0": np.ones((2, 3), np.float32) * 1.1})
    row = Row("model", "case", False, 1)
    harness.check_engines(row, tmp_path, ["ours", "openvino", "onnxruntime"])
    assert set(row.problems) == {"onnxruntime"}
