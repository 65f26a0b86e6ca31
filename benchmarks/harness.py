"""Runs the benchmarks: checks the answer, takes turns with the peers, prints a table, appends JSON lines.

Only one process computes at a time. Each round gives every contestant one turn, so that a slow minute of the machine hits all of
them; a turn's time is the best of its calls, the time printed is the median of the rounds, the ratio is the median over the rounds of
(peer / ours) within one round: above 1, fastlm is faster.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import _C, __version__, backend
from fastlm.benchmarks import peers, worker
from fastlm.testing import case_id


class Contestant:
    """A worker process and the pipe to it."""

    def __init__(self, who: str, python: str, threads: int) -> None:
        self.who = who
        n = str(threads)
        env = {**os.environ, "FASTLM_NUM_THREADS": n, "OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, "MKL_NUM_THREADS": n}
        env.pop("OPENBLAS_CORETYPE", None)  # NumPy at its best
        self.process = subprocess.Popen(
            [python, str(Path(worker.__file__)), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("FASTLM_DEBUG") else None,
            text=True,
            env=env,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process ended with {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended by itself
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class Row:
    """One case, timed."""

    op: str
    case: str
    backward: bool
    threads: int
    rounds: dict[str, list[float]] = field(default_factory=dict)  # contestant -> best seconds of each round
    setups: dict[str, str] = field(default_factory=dict)  # contestant -> precision, threads
    memory: dict[str, float] = field(default_factory=dict)  # contestant -> MB, the most at once, above the idle process
    work: tuple[float, float] | None = None  # operations, bytes
    tokens: int | None = None  # of one call of a model
    roof: dict[str, float] = field(default_factory=dict)  # backend.roof(), and bytes -> GB/s of reading that many again and again
    problems: dict[str, str] = field(default_factory=dict)
    ceiling: str = "gflops"  # of `roof`: what its operations are compared with
    cold: bool = False  # it reads memory that no cache holds, whatever its size

    @property
    def seconds(self) -> float:
        return self.median("ours")

    def median(self, who: str) -> float:
        return statistics.median(self.rounds[who]) if self.rounds.get(who) else math.nan

    def ratio(self, peer: str) -> float | None:
        """How many times faster than the peer; None where it is absent."""
        if not self.rounds.get(peer) or not self.rounds.get("ours"):
            return None
        return statistics.median(p / o for p, o in zip(self.rounds[peer], self.rounds["ours"], strict=True))

    @property
    def share(self) -> float | None:
        """The share of the roof: the shortest time that the measured ceilings allow over the time taken."""
        if not self.work or not self.roof:
            return None
        flops, size = self.work
        return max(flops / self.roof[self.ceiling], size / self.bandwidth(size)) / 1e9 / self.seconds

    def bandwidth(self, size: float) -> float:
        """GB/s of reading `size` bytes that were used a moment ago: small operands stay in cache. Of memory where the row is cold."""
        if self.cold:
            return self.roof["read_gbs"]
        sizes = sorted(int(k) for k in self.roof if k.isdigit())
        return self.roof[str(min(sizes, key=lambda s: abs(math.log(max(size, 1.0) / s))))]

    def record(self, versions: dict[str, str]) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "cpu": _C.cpu_name(),
            "system": platform.platform(),
            "isa": backend.isa(),
            "threads": self.threads,
            "load": round(os.getloadavg()[0], 2),
            "versions": {"fastlm": __version__, "python": platform.python_version(), **versions},
            "op": self.op,
            "case": self.case,
            "pass": "forward + backward" if self.backward else "forward",
            "ms": {k: round(self.median(k) * 1e3, 6) for k in self.rounds},
            "rounds_ms": {k: [round(t * 1e3, 6) for t in v] for k, v in self.rounds.items()},
            "setups": self.setups,
            "peak_mb": {k: round(v, 1) for k, v in self.memory.items() if math.isfinite(v)},
            "ratio": {k: self.ratio(k) for k in self.rounds if k != "ours"},
            "work": self.work,
            "tokens_per_second": {k: self.tokens / self.median(k) for k in self.rounds} if self.tokens else None,
            "roof": self.roof,
            "share_of_roof": self.share,
            "problems": self.problems,
        }


def commit() -> str | None:
    """The commit of the source tree, with a plus where it was changed; None for an installed package."""
    git = ["git", "-C", str(worker.ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def operations() -> list[str]:
    """The names that have a benchmark file, models last."""
    names = sorted(p.stem.removeprefix("bench_") for p in worker.HERE.glob("bench_*.py"))
    return [n for n in names if n != "model"] + [n for n in names if n == "model"]


def known(ops: Sequence[str]) -> None:
    """ValueError for a name without a benchmark file."""
    unknown = sorted(set(ops) - set(operations()))
    if unknown:
        raise ValueError(f"[bench] no benchmark is called {', '.join(unknown)}; there are {', '.join(operations())}")


def check(row: Row, folder: Path, present: Sequence[str], reference: str) -> None:
    """Ours to 1e-5 of the largest element, the peers to 2e-2: enough to see that all compute the same. The tests hold what is tight."""
    exact = np.load(folder / f"{reference}.npz")
    for who in present:
        if who == "numpy":
            continue
        got = np.load(folder / f"{who}.npz")
        for name in exact.files:
            if who != "ours" and name not in got.files:
                continue
            want, bound = exact[name], 1e-5 if who == "ours" else 2e-2
            if name not in got.files or got[name].shape != want.shape:
                row.problems[who] = (
                    f"wrong answer: {name} must be {want.shape}, got {got[name].shape if name in got.files else 'nothing'}"
                )
            elif want.dtype.kind in "iub":
                if who == "ours" and not np.array_equal(got[name], want):
                    row.problems[who] = f"wrong answer: {name} differs from the oracle's"
            else:
                finite = np.isfinite(want)
                error = float(np.max(np.abs(got[name][finite] - want[finite]), initial=0.0))
                scale = float(np.max(np.abs(want[finite]), initial=0.0))
                if not error <= bound * scale or not np.array_equal(got[name][~finite], want[~finite], equal_nan=True):
                    row.problems[who] = f"wrong answer: {name} is off by {error:.2e}, the largest element is {scale:.2e}"


def check_engines(row: Row, folder: Path, present: Sequence[str]) -> None:
    """Of whole models: the peers against ours, float32 alone, since rounding parts the others. Greedy ids may part later, the first must
    agree; states and embeddings to 2e-2 of the largest."""
    files = {who: np.load(folder / f"{who}.npz") for who in present}
    answers = {who: file["0"] for who, file in files.items() if file.files}  # a program of its own shows no answer
    mine = answers.pop("ours", None)
    if mine is None:
        return
    for who, theirs in answers.items():
        if mine.dtype.kind in "iu":
            first, other = (np.atleast_2d(x)[:, 0].tolist() for x in (mine, theirs))
            if first != other:
                row.problems[who] = f"its first tokens are {other}, ours {first}"
        elif mine.shape != theirs.shape:
            row.problems[who] = f"its answer is {theirs.shape}, ours {mine.shape}"
        else:
            error, scale = float(np.abs(mine - theirs).max()), float(np.abs(mine).max())
            if not error <= 2e-2 * scale:
                row.problems[who] = f"its answer is off by {error:.2e}, the largest element is {scale:.2e}"


def run_case(row: Row, index: int, contestants: dict[str, Contestant], rounds: int, seconds: float) -> Row:
    module, model = worker.bench(row.op), worker.is_model(row.op)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        present, slow = [], {}
        for who, contestant in contestants.items():
            answer = contestant.ask("prepare", op=row.op, index=index, backward=row.backward, result=str(folder / f"{who}.npz"))
            if answer.get("error"):
                row.problems[who] = answer["error"]
            elif answer["present"]:
                present.append(who)
                slow[who] = answer["seconds"]
                if answer["label"]:
                    row.setups[who] = answer["label"]
            if answer.get("work"):
                row.work, row.tokens = (answer["work"][0], answer["work"][1]), answer["tokens"]
        if "ours" not in present:
            return row
        if model:
            case = worker.cases(row.op)[index]
            if case.get("kind") == "f32" and case["task"] != "train":
                check_engines(row, folder, present)
        elif "numpy" in present:
            wide = (folder / "numpy.npz").stat().st_size < 1 << 28 and slow["numpy"] < 10  # else float32 NumPy is the reference
            if wide:
                contestants["numpy"].ask("exact", op=row.op, index=index, backward=row.backward, result=str(folder / "exact.npz"))
            found = [p for p in present if p not in getattr(module, "RANDOM", ())]
            check(row, folder, found, "exact" if wide and (folder / "exact.npz").exists() else "numpy")
    for _ in range(rounds):
        for who in tuple(present):
            if slow[who] > (30.0 if model else 3.0):  # so slow that its first call is timing enough
                row.rounds.setdefault(who, []).append(slow[who])
                continue
            time.sleep(0.02)  # the threads of the one before go to sleep
            answer = contestants[who].ask("time", seconds=seconds, warm=0.05)
            if answer.get("error"):
                row.problems[who] = answer["error"]
                row.rounds.pop(who, None)
                present.remove(who)
            else:
                row.rounds.setdefault(who, []).append(min(answer["times"]))
                row.memory[who] = max(row.memory.get(who, 0.0), answer.get("memory", math.nan))
    return row


def label(op: str, index: int) -> str:
    """A case as the table shows it and as --case selects it."""
    case = worker.cases(op)[index]
    shown: str = worker.bench(op).name(case) if worker.is_model(op) else case_id(case)
    return shown


def selected(ops: Sequence[str], wanted: Sequence[str] = (), quick: bool = False) -> dict[str, list[int]]:
    """{operation: numbers of its cases}: those whose label contains one of `wanted`, or all. ValueError where none does."""
    known(ops)
    chosen = {op: [i for i in range(len(worker.cases(op))) if not wanted or any(w in label(op, i) for w in wanted)] for op in ops}
    if not any(chosen.values()):
        there = ", ".join(label(op, i) for op in ops for i in range(len(worker.cases(op))))
        raise ValueError(f"[bench] no case is called {', '.join(wanted)}; there are {there}")
    return {op: indices[:2] if quick else indices for op, indices in chosen.items() if indices}


def measured_roof(contestant: Contestant, roof: dict[str, float]) -> dict[str, float]:
    """A roof measured while something else ran is too low: measured often, the highest counts."""
    found: dict[str, float] = contestant.ask("roof").get("roof", {})
    return {k: max(v, roof.get(k, 0.0)) for k, v in (roof | found).items()} if found else roof


def run(
    ops: Sequence[str] = (),
    threads: int | None = None,
    quick: bool = False,
    wanted: Sequence[str] = (),
    rounds: int | None = None,
    against: Sequence[str] = (),
) -> Iterator[Row]:
    """Yields one row after the other. `quick`: the first two cases of each operation and short turns. `wanted`: see `selected`;
    `against`: these peers alone. All rows share one `roof`, which the last measurements may still raise."""
    chosen = selected(ops or operations(), wanted, quick)
    threads = threads or backend.num_threads()
    contestants: dict[str, Contestant] = {}
    try:
        pythons = {"ours": sys.executable} | {who: python for who, (python, _) in peers.find(against).items()}
        contestants["ours"] = Contestant("ours", sys.executable, threads)
        roof = measured_roof(contestants["ours"], {})  # before any peer starts
        for op, indices in chosen.items():
            for who, python in pythons.items():
                if who in contestants and contestants[who].process.poll() is None:
                    continue
                if any(worker.takes_part(who, op, index) for index in indices):  # one that died starts anew
                    contestants[who] = Contestant(who, python, threads)
                    contestants[who].ask("ready")
            roof.update(measured_roof(contestants["ours"], roof))
            for index in indices:
                taking = {who: c for who, c in contestants.items() if worker.takes_part(who, op, index)}
                for backward in worker.passes(op, index):
                    row = Row(op, label(op, index), backward, threads, roof=roof)
                    row.ceiling = worker.ceiling(op, index) or row.ceiling
                    row.cold = "cold" in worker.cases(op)[index]
                    yield run_case(row, index, taking, rounds or (2 if quick else 5), 0.05 if quick else 0.3)
            roof.update(measured_roof(contestants["ours"], roof))
    finally:
        for contestant in contestants.values():
            contestant.close()


# --- printing ---


def heading(found: Sequence[str]) -> str:
    head = f"{'operation':<20} {'case':<34} {'pass':<5} {'ms':>9} {'GFLOP/s':>8} {'GB/s':>6} {'roof':>5}"
    return head + "".join(f" {'/ ' + p:>14}" for p in found)


def line(row: Row, found: Sequence[str]) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    flops, size = row.work or (math.nan, math.nan)
    ms, passes = row.seconds * 1e3, "f + b" if row.backward else "f"
    text = f"{row.op:<20} {row.case[:34]:<34} {passes:<5} {number(ms, '.4g' if ms < 1e4 else '.0f'):>9}"
    text += (
        f" {number(flops / row.seconds / 1e9, '.1f'):>8} {number(size / row.seconds / 1e9, '.1f'):>6} {number(row.share, '.0%'):>5}"
    )
    for peer in found:
        ratio = row.ratio(peer)
        text += f" {('-' if ratio is None else f'{ratio:.2f}x'):>14}"
    if row.tokens and row.rounds:
        speeds = (
            f"{who} {row.tokens / row.median(who):,.0f}" + (f" ({row.setups[who]})" if who in row.setups else "")
            for who in row.rounds
        )
        text += "\n    tokens/s: " + ", ".join(speeds)
    if row.op == "model" and "train" in row.case and row.memory:
        text += "\n    peak MB: " + ", ".join(f"{who} {mb:,.0f}" for who, mb in row.memory.items())
    return text


def main(
    ops: Sequence[str],
    threads: int | None,
    quick: bool,
    output: str | None,
    plot: str | None,
    wanted: Sequence[str] = (),
    rounds: int | None = None,
    against: Sequence[str] = (),
) -> int:
    """Prints the table; 1 where an answer was wrong."""
    chosen = selected(ops or operations(), wanted, quick)
    found = peers.find(against)
    versions = {k: v for k, (_, v) in found.items()}
    threads = threads or backend.num_threads()
    print(
        f"{_C.cpu_name()}, {backend.isa()}, {threads} thread{'s' if threads > 1 else ''}; "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    absent = [p for p in peers.PEERS if p not in found and (not against or p in against)]
    if absent:
        print(f"not installed: {', '.join(absent)} (FASTLM_PEERS_PYTHON may name an interpreter that has them)")
    if (load := os.getloadavg()[0]) > 0.5:
        print(
            f"the machine is not quiet (load {load:.1f}): what computes beside this makes the figures worse, the peers' most of all"
        )
    # A column for each peer that takes part in any of the cases.
    columns = [p for p in found if any(worker.takes_part(p, op, i) for op, indices in chosen.items() for i in indices)]
    path = Path(output) if output else default_output()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if path.exists() else 0
    rows: list[Row] = []
    wrong = False
    for row in run(ops, threads, quick, wanted, rounds, against):
        if not rows:
            print(roof_line(row.roof))
            print(heading(columns))
        rows.append(row)
        print(line(row, columns), flush=True)
        for who, problem in row.problems.items():
            print(f"    {who}: {problem}")
        wrong = wrong or "ours" in row.problems
        with path.open("a") as file:
            file.write(json.dumps(row.record(versions)) + "\n")
    print(f"at the end: {roof_line(rows[-1].roof)}")
    os.truncate(path, before)  # once more, with the roof as it is known now
    with path.open("a") as file:
        file.writelines(json.dumps(row.record(versions)) + "\n" for row in rows)
    print(f"written to {path}")
    if plot:
        from fastlm.benchmarks.roofline import draw

        draw([row.record(versions) for row in rows], plot)
        print(f"roofline drawn to {plot}")
    return int(wrong)


def roof_line(roof: dict[str, float]) -> str:
    return f"roof: {roof['gflops']:.0f} GFLOP/s float32, {roof['read_gbs']:.1f} GB/s read, {roof['copy_gbs']:.1f} GB/s copy"


def default_output() -> Path:
    """benchmarks/results/DATE.jsonl in a source tree, else the same below the cache folder."""
    name = f"{datetime.now(UTC):%Y-%m-%d}.jsonl"
    if worker.HERE.parent == worker.ROOT:
        return worker.HERE / "results" / name
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastlm" / "bench" / name
