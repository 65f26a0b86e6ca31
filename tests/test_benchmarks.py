"""The benchmark measures what it says: answers are checked, every operation has its file, a line holds what a reader needs."""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlm import _C
from fastlm.benchmarks import harness, peers, report, results, targets, worker
from fastlm.benchmarks.harness import Row
from fastlm.cli import main


def test_every_operation_has_a_benchmark():
    assert set(_C.ops) - {"roof"} <= set(harness.operations())
    for op in harness.operations():
        assert worker.cases(op), op
        assert callable(worker.bench(op).work), op


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A file of results of a quick run without peers, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.delenv("FASTLM_PEERS_PYTHON", raising=False)
        patch.setattr(peers, "installed", lambda python: {"numpy": np.__version__})
        for _ in range(2):  # the second finds everything there
            assert harness.main(["rms_norm"], 1, quick=True, output=str(path)) == 0
    return path, out.getvalue()


def test_a_row_has_a_line_for_each_contestant(measured):
    lines = results.read(measured[0])
    timed = [line for line in lines if line["op"] == "rms_norm"]
    assert [(line["case"], line["pass"], line["contestant"]) for line in timed] == [
        (case, p, who)
        for case in ("1024x4096", "4096x2048")  # the table comes first
        for p in ("forward", "forward + backward")
        for who in ("ours", "numpy")
    ]
    for line in timed:
        assert line["problem"] is None
        assert line["threads"] == 1
        assert line["isa"] == (_C.isa() if line["contestant"] == "ours" else None)
        assert line["median_ms"] == pytest.approx(statistics.median(line["rounds_ms"]), rel=1e-4)
        assert line["spread"] >= 0
        assert line["share_of_roof"] > 0
        assert line["unit"] == "GB/s"
        assert line["rate"] == pytest.approx(line["work"][1] / line["median_ms"] / 1e6, rel=1e-3)
        assert set(line["versions"]) == {"fastlm", "python"} | ({"numpy"} if line["contestant"] == "numpy" else set())
        assert line["date"]
    assert {"gflops", "read_gbs", "int8_gops"} <= set(next(line for line in lines if line["op"] == "roof")["roof"])


def test_rows_that_are_there_are_not_measured_again(measured):
    assert "0 of 4 rows are in" in measured[1]
    assert "4 of 4 rows are in" in measured[1]
    rows = harness.items(["rms_norm"], (1,), quick=True)
    lines = results.read(measured[0])
    assert harness.missing(rows, lines, ["ours", "numpy"]) == []
    assert harness.missing(rows, lines, ["ours", "numpy", "torch"]) == rows, "a peer came: its ratio needs a run with it"
    assert len(harness.missing(harness.items(["rms_norm"], (2, 1), quick=True), lines, ["ours", "numpy"])) == 4


def test_work_of_a_model_is_what_is_needed():
    """Of GPT-2's prompt: the last layer but for keys and values, and the head, for one position."""
    bench = worker.bench("model")
    named = {bench.name(case): case for case in bench.CASES}
    flops, size = bench.work(False, named["gpt2-prompt-f32-512"])
    layer, C = 12 * 768 * 768, 768
    assert flops == 2 * (11 * layer + 2 * C * C) * 512 + 2 * 10 * C * C + 2 * 50257 * C + 4 * C * (11 * 512 * 512 / 2 + 512)
    assert size == 4 * (12 * layer + 50257 * C)
    assert bench.work(False, named["gpt2-decode-bf16-1"])[1] == 32 * 12 / 8 * (12 * layer + 50257 * C)
    assert bench.CEILING(named["bert-base-uncased-encode-int8-8-128"]) == "int8_gops"


def test_no_measured_row_is_above_its_roof():
    """Of the published results: a row that is has its work, or its ceiling, wrong."""
    files = sorted((Path(harness.__file__).parent / "results").glob("*.jsonl"))
    for path in files[-1:]:
        shares = {key: group.share() for key, group in results.groups(results.read(path)).items()}
        assert any(shares.values())
        assert not {key: share for key, share in shares.items() if share is not None and share > 1.05}


def test_no_row_is_begun_after_its_time(monkeypatch):
    monkeypatch.delenv("FASTLM_PEERS_PYTHON", raising=False)
    assert list(harness.run(harness.items(["rms_norm"], (1,), quick=True), {}, quick=True, minutes=-1.0)) == []


def test_the_command_prints_the_table(measured, capsys, tmp_path):
    assert main(["bench", "--table", str(measured[0])]) == 0
    out = capsys.readouterr().out
    assert "| rms_norm | `1024x4096` | f + b |" in out
    assert "6x" in out
    assert "Not measured: matmul `512x512,512x512`" in out
    assert measured[0].with_suffix(".md").read_text() == out
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["bench", "--table", str(tmp_path / "empty.jsonl")]) == 2
    (tmp_path / "other.jsonl").write_text('{"op": 1}\n')
    assert main(["bench", "--table", str(tmp_path / "other.jsonl")]) == 2


def test_a_plot_that_is_asked_for_and_not_drawn(measured, capsys, monkeypatch, tmp_path):
    """Without matplotlib the command says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastlm.benchmarks.roofline", raising=False)
    assert main(["bench", "--table", str(measured[0]), "--plot", str(tmp_path / "roof.png")]) == 2
    assert "roof.png is not drawn: pip install 'fastlm[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "numpi"], "no peer is called numpi; there are numpy, torch, "),
        (["--minutes", "0"], "minutes must be above 0, got 0."),
        (["--minutes", "nan"], "minutes must be above 0, got nan."),
        (["--json", "out.md"], "another name than the table and the plot, out.md and out.png."),
        (["--plot", "out.jsonl"], "another name than the table and the plot, out.md and out.jsonl."),
        (["--table", "none.jsonl"], "no such file: none.jsonl"),
        (["--table", "latin.jsonl"], "line 1 of latin.jsonl is not a measurement"),
    ],
)
def test_the_command_refuses(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"op": "caf\xe9"}\n')
    assert main(["bench", "rms_norm", "--quick", "--json", "out.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["latin.jsonl"]


def test_the_command_lists_cases(capsys):
    assert main(["bench", "--list", "--case", "8192x768"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"layer_norm 8192x768", "rms_norm 8192x768"} <= set(lines)
    assert all("8192x768" in line for line in lines)


def test_every_target_is_a_case():
    found = {(r.op, harness.label(r.op, r.index), r.backward) for r in harness.items(threads=(1,))}
    assert found == set(targets.BY_KEY)
    assert len(targets.TABLE) == len(targets.BY_KEY)
    first = harness.items(threads=(2, 1))
    assert [r.threads for r in first] == sorted((r.threads for r in first), reverse=True)
    assert tuple((*t.key, 2) for t in targets.TABLE) == tuple(r.key for r in first[: len(targets.TABLE)])


def line_of(who, times, run="a", case="1024x4096", memory=None, problem=None):
    return {
        "op": "rms_norm", "case": case, "pass": "forward", "threads": 2, "isa": "avx512", "contestant": who, "run": run,
        "median_ms": statistics.median(times) if times else None, "spread": 0.1, "rounds_ms": times, "peak_mb": memory,
        "problem": problem, "work": [1e6, 1e6], "ceiling": "gflops", "cold": False, "rate": 1.0, "unit": "GB/s", "versions": {},
        "cpu": "a cpu", "date": "2026-01-02T03:04:05", "commit": "abc",
    }  # fmt: skip


def test_what_a_target_is_held_against():
    lines = [
        line_of("ours", [9.0, 9.0, 9.0], "before"),
        line_of("torch", [9.0, 9.0, 9.0], "before"),
        line_of("ours", [1.0, 2.0, 1.0], memory=30.0),
        line_of("numpy", [50.0, 50.0, 50.0], memory=1.0),
        line_of("torch", [4.0, 10.0, 4.0], memory=100.0),
        line_of("openvino", [2.0, 2.0, 2.0], memory=200.0, problem="wrong answer"),
    ]
    (group,) = results.groups(lines).values()
    assert group.run == "a", "the last run of a row counts"
    assert group.best() == "torch", "a peer with another answer does not count"
    assert group.ratio("torch") == pytest.approx(4.0), "the median of 4, 5, 4, round by round"
    assert report.verdict(group, targets.Bar(4.0)) == ("torch 4.00x", True)
    assert report.verdict(group, targets.Bar(4.1)) == ("torch 4.00x", False)
    assert report.verdict(group, targets.Bar(4.1, ("ctranslate2",))) == ("-", None)
    assert report.verdict(group, targets.Bar(0.3, memory=True)) == ("memory 0.30x of torch", True)
    assert report.verdict(group, targets.Bar(0.29, memory=True))[1] is False
    text = report.markdown(lines)
    assert "| torch 4.00x | 4x | yes |" in text
    assert "1 of 1 targets met" in text
    assert "openvino: wrong answer" in text
    lines[2]["problem"] = "wrong answer: y is off"
    assert "**no**" in report.markdown(lines)


def test_the_roof_is_the_highest_of_the_file():
    roof = {"gflops": 100.0, "read_gbs": 10.0, str(1 << 16): 80.0, str(1 << 20): 10.0}
    low = roof | {"gflops": 1.0}
    at = {"op": "roof", "case": "", "pass": "", "threads": 2, "isa": "avx512", "contestant": "ours"}
    lines = [at | {"roof": low}, line_of("ours", [1.0]), at | {"roof": roof}]
    (group,) = results.groups(lines).values()
    assert group.share() == pytest.approx(0.1), "1 MB at 10 GB/s takes 0.1 ms"


def test_the_roofline_is_drawn(measured, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.draw(results.read(measured[0]), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    assert not report.draw([], tmp_path / "none.png")


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


def test_memory_is_measured_in_new_processes(monkeypatch):
    """What a row leaves in a process is taken again by the next one, which would then seem to need nothing."""
    rows = [harness.Item("rope", i, False, 1) for i in range(3)]
    last = ("rope", harness.label("rope", 2), False)
    monkeypatch.setitem(targets.BY_KEY, last, targets.Target(*last, (targets.Bar(0.75, memory=True),)))
    seen = []

    def run_case(row, index, contestants, rounds, seconds):
        seen.append(contestants["ours"].process.pid)
        return row

    monkeypatch.setattr(harness, "run_case", run_case)
    assert len(list(harness.run(rows, {}, quick=True))) == 3
    assert seen[0] == seen[1] != seen[2]
