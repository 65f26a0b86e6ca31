"""Runs the benchmarks: checks the answer, takes turns with the peers, prints a line for each row, appends JSON lines.

Only one process computes at a time. Each round gives every contestant one turn, so that a slow minute of the machine hits all of
them; a turn's time is the best of its calls, the time printed is the median of the rounds, the ratio is the median over the rounds of
(peer / ours) within one round: above 1, fastlm is faster. Rows that the file of results holds are not measured again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import select
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
from fastlm.benchmarks import peers, report, results, targets, worker
from fastlm.testing import case_id

PATIENCE = 200.0  # seconds that a contestant may take for one answer
AVX2 = "ours_avx2"  # ours on the smaller instruction set, a contestant of its own


class Contestant:
    """A worker process and the pipe to it."""

    def __init__(self, who: str, python: str, threads: int) -> None:
        self.who = who
        n = str(threads)
        env = {**os.environ, "FASTLM_NUM_THREADS": n, "OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, "MKL_NUM_THREADS": n}
        env.pop("OPENBLAS_CORETYPE", None)  # NumPy at its best
        if who == AVX2:
            env["FASTLM_ISA"] = "avx2"
        self.process = subprocess.Popen(
            [python, str(Path(worker.__file__)), who.removesuffix("_avx2")],
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
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                self.process.kill()
                self.process.wait()
                return {"error": f"no answer within {PATIENCE:.0f} s"}
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
    memory: dict[str, float] = field(default_factory=dict)  # contestant -> MB, the most at once; see worker.py
    work: tuple[float, float] | None = None  # operations, bytes
    tokens: int | None = None  # of one call of a model
    roof: dict[str, float] = field(default_factory=dict)  # backend.roof(), and bytes -> GB/s of reading that many again and again
    problems: dict[str, str] = field(default_factory=dict)
    ceiling: str = "gflops"  # of `roof`: what its operations are compared with
    cold: bool = False  # it reads memory that no cache holds, whatever its size
    absent: list[str] = field(default_factory=list)  # contestants that cannot do this case

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
        return self.share_of("ours")

    def share_of(self, who: str) -> float | None:
        if not self.work or not self.roof or not self.rounds.get(who):
            return None
        return results.least_seconds(self.work, self.roof, self.ceiling, self.cold)[0] / self.median(who)

    def rate(self, who: str) -> tuple[float, str] | None:
        """Tokens a second of a model; operations a second, or bytes where memory bounds the row."""
        if self.tokens:
            return self.tokens / self.median(who), "tokens/s"
        if not self.work:
            return None
        reading = bool(self.roof) and results.least_seconds(self.work, self.roof, self.ceiling, self.cold)[1]
        return (self.work[1] / self.median(who) / 1e9, "GB/s") if reading else (self.work[0] / self.median(who) / 1e9, "GFLOP/s")

    def record(self, versions: dict[str, str]) -> list[dict[str, Any]]:
        """A line for each contestant."""
        about = about_here(self.threads) | {"run": datetime.now(UTC).isoformat(timespec="milliseconds")}
        lines = []
        for who in dict.fromkeys((*self.rounds, *self.problems, *self.absent)):
            times = self.rounds.get(who)
            rate = self.rate(who) if times else None
            share, used = self.share_of(who), self.memory.get(who, math.nan)
            version = {} if who in results.OURS else {who: versions.get(who, "unknown")}
            lines.append(about | {
                "op": self.op,
                "case": self.case,
                "pass": results.PASSES[self.backward],
                "isa": "avx2" if who == AVX2 else backend.isa() if who == "ours" else None,
                "contestant": who,
                "setup": self.setups.get(who),
                "median_ms": round(self.median(who) * 1e3, 6) if times else None,
                "spread": round(results.spread(times), 4) if times else None,
                "rounds_ms": [round(t * 1e3, 6) for t in times or ()],
                "rate": float(f"{rate[0]:.6g}") if rate else None,
                "unit": rate[1] if rate else None,
                "share_of_roof": None if share is None else round(share, 4),
                "peak_mb": round(used, 1) if math.isfinite(used) else None,
                "work": self.work,
                "ceiling": self.ceiling,
                "cold": self.cold,
                "tokens": self.tokens,
                "problem": self.problems.get(who) or ("cannot do this" if who in self.absent else None),
                "versions": {"fastlm": __version__, "python": platform.python_version(), **version},
            })  # fmt: skip
        return lines


def about_here(threads: int) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _C.cpu_name(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
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
            if who not in results.OURS and name not in got.files:
                continue
            want, bound = exact[name], 1e-5 if who in results.OURS else 2e-2
            if name not in got.files or got[name].shape != want.shape:
                row.problems[who] = (
                    f"wrong answer: {name} must be {want.shape}, got {got[name].shape if name in got.files else 'nothing'}"
                )
            elif want.dtype.kind in "iub":
                if who in results.OURS and not np.array_equal(got[name], want):
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
            else:
                row.absent.append(who)
            if answer.get("work") and who == "ours":
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
    # A call that takes a second needs no second one in its turn and is warmed once, one of three not at all; three turns do where a
    # round takes ten seconds.
    once = slow["numpy"] if slow.get("numpy", 0.0) > 1.0 else None
    if once is not None:
        present.remove("numpy")
    if sum(slow[who] for who in present) > 10.0:
        rounds = min(rounds, 3)
    for number in range(rounds):
        for who in tuple(present):
            time.sleep(0.02)  # the threads of the one before go to sleep
            long = slow[who] > (1.0 if number else 3.0)
            answer = contestants[who].ask("time", seconds=seconds, warm=0.0 if long else 0.05, least=1 if slow[who] > 1.0 else 2)
            if answer.get("error"):
                row.problems[who] = answer["error"]
                row.rounds.pop(who, None)
                present.remove(who)
            else:
                row.rounds.setdefault(who, []).append(min(answer["times"]))
                row.memory[who] = max(row.memory.get(who, 0.0), answer.get("memory", math.nan))
    if once is not None and present:
        row.rounds["numpy"] = [once] * rounds  # its first call is timing enough
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


@dataclass(frozen=True)
class Item:
    """A row to be measured."""

    op: str
    index: int
    backward: bool
    threads: int

    @property
    def key(self) -> results.Key:
        return self.op, label(self.op, self.index), self.backward, self.threads


def items(
    ops: Sequence[str] = (),
    threads: Sequence[int] = (),
    wanted: Sequence[str] = (),
    everything: bool = False,
    quick: bool = False,
) -> list[Item]:
    """The rows: of the operations' cases that `selected` finds those in the table of targets, or every one, also where an operation
    has none there. One number of threads after the other, operations in the order of the table."""
    order = list(dict.fromkeys(t.op for t in targets.TABLE))
    chosen = selected(ops or (operations() if everything else order), wanted, quick)
    names = sorted(chosen, key=lambda op: order.index(op) if op in order else len(order))
    rows = [Item(op, i, b, 0) for op in names for i in chosen[op] for b in worker.passes(op, i)]
    listed = [
        r for r in rows if everything or quick or r.op not in order or (r.op, label(r.op, r.index), r.backward) in targets.BY_KEY
    ]
    place = {key: n for n, key in enumerate(targets.BY_KEY)}
    listed.sort(key=lambda r: place.get((r.op, label(r.op, r.index), r.backward), len(place)))
    return [Item(r.op, r.index, r.backward, n) for n in threads or (backend.num_threads(),) for r in listed]


class Ring:
    """The contestants for one number of threads, started when they are needed, and the roof by instruction set."""

    def __init__(self, pythons: dict[str, str], threads: int) -> None:
        self.pythons, self.threads = pythons, threads
        self.contestants: dict[str, Contestant] = {}
        self.roofs: dict[str, dict[str, float]] = {}

    def get(self, who: str) -> Contestant:
        if who not in self.contestants or self.contestants[who].process.poll() is not None:  # one that died starts anew
            self.contestants[who] = Contestant(who, self.pythons[who], self.threads)
            self.contestants[who].ask("ready")
        return self.contestants[who]

    def measure_roof(self) -> list[dict[str, Any]]:
        """The ceilings once more, as lines of the file; the highest found are kept."""
        lines = []
        for who in (w for w in results.OURS if w in self.pythons):
            isa = backend.isa() if who == "ours" else "avx2"
            found = self.get(who).ask("roof").get("roof", {})
            if found:
                self.roofs[isa] = results.higher(self.roofs.get(isa, {}), found)
                what = {"op": "roof", "case": "", "pass": "", "isa": isa, "contestant": who, "roof": found}
                lines.append(about_here(self.threads) | what)
        return lines

    @property
    def roof(self) -> dict[str, float]:
        return self.roofs.get(backend.isa(), {})

    def close(self) -> None:
        for contestant in self.contestants.values():
            contestant.close()
        self.contestants.clear()


def contestants_of(item: Item, pythons: dict[str, str]) -> list[str]:
    return [who for who in pythons if worker.takes_part(who.removesuffix("_avx2"), item.op, item.index)]


def run(
    rows: Sequence[Item],
    found: dict[str, tuple[str, str]],
    *,
    quick: bool = False,
    rounds: int | None = None,
    minutes: float = math.inf,
    roofs: Any = None,
) -> Iterator[Row]:
    """Yields one row after the other, for `minutes`: no row is begun after that. `found`: {peer: (interpreter, version)}; `quick`: short
    turns, and no row of ours on AVX2; `roofs` is called with the lines of each measurement of the roof."""
    pythons = {"ours": sys.executable}
    if not quick and backend.isa() == "avx512":
        pythons[AVX2] = sys.executable
    pythons |= {who: python for who, (python, _) in found.items()}
    until = time.monotonic() + 60 * minutes
    tell = roofs or (lambda _: None)
    ring: Ring | None = None
    op = ""
    try:
        for item in rows:
            if time.monotonic() > until:
                break
            if ring is None or ring.threads != item.threads or item.op != op:
                if ring is not None and ring.threads != item.threads:
                    ring.close()
                    ring = None
                ring = ring or Ring(pythons, item.threads)
                tell(ring.measure_roof())
                op = item.op
            case = worker.cases(item.op)[item.index]
            row = Row(item.op, label(item.op, item.index), item.backward, item.threads, roof=ring.roof, cold="cold" in case)
            row.ceiling = worker.ceiling(item.op, item.index) or row.ceiling
            target = targets.BY_KEY.get((item.op, row.case, item.backward))
            if target and any(bar.memory for bar in target.bars):
                ring.close()  # what an earlier row has left in a process would not count as this one's
            taking = {who: ring.get(who) for who in contestants_of(item, pythons)}
            yield run_case(row, item.index, taking, rounds or (2 if quick else 5), 0.05 if quick else 0.2)
        if ring is not None:
            tell(ring.measure_roof())
    finally:
        if ring is not None:
            ring.close()


def missing(rows: Sequence[Item], lines: Sequence[dict[str, Any]], pythons: Sequence[str]) -> list[Item]:
    """The rows that the file does not hold yet: with a line for every contestant that takes part."""
    there = {key: set(group.lines) for key, group in results.groups(lines).items()}
    return [r for r in rows if not set(contestants_of(r, dict.fromkeys(pythons, ""))) <= there.get(r.key, set())]


def main(
    ops: Sequence[str] = (),
    threads: int | None = None,
    *,
    quick: bool = False,
    everything: bool = False,
    output: str | None = None,
    plot: str | None = None,
    wanted: Sequence[str] = (),
    rounds: int | None = None,
    against: Sequence[str] = (),
    again: bool = False,
    minutes: float | None = None,
) -> int:
    """Measures what the file does not hold yet, or everything `again`, and writes the table and the plot beside it; 1 where an answer was
    wrong. `threads`: this number alone, else all and one."""
    if minutes is not None and not minutes > 0:
        raise ValueError(f"[bench] minutes must be above 0, got {minutes:g}.")
    known = ("numpy", *peers.PEERS, "dense")
    if unknown := [peer for peer in against if peer not in known]:
        raise ValueError(f"[bench] no peer is called {', '.join(unknown)}; there are {', '.join(known)}.")
    most = backend.num_threads()
    rows = items(ops, (threads,) if threads else tuple(dict.fromkeys((most, 1))), wanted, everything, quick)
    found = peers.find(against)
    versions = {k: v for k, (_, v) in found.items()}
    path = Path(output) if output else default_output()
    table, picture = path.with_suffix(".md"), Path(plot) if plot else path.with_suffix(".png")
    if path in (table, picture):
        raise ValueError(f"[bench] the lines must go to a file of another name than the table and the plot, {table} and {picture}.")
    todo = rows
    if not again:
        mine = ["ours", *([AVX2] if not quick and backend.isa() == "avx512" else [])]
        todo = missing(rows, results.read(path), [*mine, *found])
    print(
        f"{_C.cpu_name()}, {backend.isa()}, {most} threads; " + ", ".join(f"{k} {v}" for k, v in versions.items() if k != "dense")
    )
    absent = [p for p in peers.PEERS if p not in found and (not against or p in against)]
    if absent:
        print(f"not installed: {', '.join(absent)} (FASTLM_PEERS_PYTHON may name an interpreter that has them)")
    if (load := os.getloadavg()[0]) > 0.5:
        print(
            f"the machine is not quiet (load {load:.1f}): what computes beside this makes the figures worse, the peers' most of all"
        )
    print(f"{len(rows) - len(todo)} of {len(rows)} rows are in {path}")
    # A column for each peer that takes part in any of the cases.
    columns = [p for p in (AVX2, *found) if any(p in contestants_of(r, {p: ""}) for r in todo) and not (p == AVX2 and quick)]
    wrong, done = False, 0
    for row in run(
        todo, found, quick=quick, rounds=rounds, minutes=minutes or math.inf, roofs=lambda lines: results.append(path, lines)
    ):
        if not done:
            print(report.roof_line(row.roof))
            print(report.heading(columns))
        done += 1
        print(report.line(row, columns), flush=True)
        for who, problem in row.problems.items():
            print(f"    {who}: {problem}")
        wrong = wrong or any(who in row.problems for who in results.OURS)
        results.append(path, row.record(versions))
    if done:
        lines = results.read(path)
        table.write_text(report.markdown(lines))
        print(f"{len(todo) - done} rows are left; written to {path} and {table}")
        if report.draw(lines, picture):
            print(f"roofline drawn to {picture}")
        else:
            print(f"no roofline: {report.NOT_DRAWN}")
    return int(wrong)


def default_output() -> Path:
    """benchmarks/results/DATE-MACHINE.jsonl in a source tree, else the same below the cache folder."""
    name = f"{datetime.now(UTC):%Y-%m-%d}-{results.machine(_C.cpu_name())}.jsonl"
    if worker.HERE.parent == worker.ROOT:
        return worker.HERE / "results" / name
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastlm" / "bench" / name
