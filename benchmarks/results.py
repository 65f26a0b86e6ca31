"""The lines of a file of results: one for each measurement, one for each time that the roof was measured.

A measurement is a contestant in a row: `run` ties together the lines of one row, whose contestants took turns, so that their rounds are
paired. Files only grow; of a row that was measured again the last run counts.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str, bool, int]  # operation, case, backward, threads
PASSES = {False: "forward", True: "forward + backward"}
OURS = ("ours", "ours_avx2")


def spread(times: Sequence[float]) -> float:
    """How far the rounds lie apart: the range over the median."""
    return (max(times) - min(times)) / statistics.median(times)


def bandwidth(roof: dict[str, float], size: float, cold: bool) -> float:
    """GB/s of reading `size` bytes that were used a moment ago: small operands stay in cache. Of memory where the row is cold."""
    if cold:
        return roof["read_gbs"]
    sizes = sorted(int(k) for k in roof if k.isdigit())
    return roof[str(min(sizes, key=lambda s: abs(math.log(max(size, 1.0) / s))))]


def least_seconds(work: Sequence[float], roof: dict[str, float], ceiling: str, cold: bool) -> tuple[float, bool]:
    """The shortest time that the measured ceilings allow, and whether memory is what bounds it."""
    computing, reading = work[0] / roof[ceiling] / 1e9, work[1] / bandwidth(roof, work[1], cold) / 1e9
    return max(computing, reading), reading > computing


def higher(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """A roof measured while something else ran is too low: measured often, the highest counts."""
    return {k: max(one.get(k, 0.0), other.get(k, 0.0)) for k in one | other}


@dataclass
class Group:
    """The lines of one row of one run, by contestant, and the roof of its threads."""

    key: Key
    run: str
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    roof: dict[str, float] = field(default_factory=dict)

    def median(self, who: str) -> float:
        found = self.lines.get(who, {}).get("median_ms")
        return math.nan if found is None else found / 1e3

    def ratio(self, peer: str, mine: str = "ours") -> float | None:
        """How many times faster than the peer: the median over the rounds. None where one of them was not timed."""
        theirs, ours = (self.lines.get(who, {}).get("rounds_ms") for who in (peer, mine))
        if not theirs or not ours:
            return None
        return float(statistics.median(p / o for p, o in zip(theirs, ours, strict=True)))

    def best(self, peers: Sequence[str] = ()) -> str | None:
        """The fastest of the peers, or of these."""
        timed = {who: self.median(who) for who in self.lines if who not in OURS and (not peers or who in peers)}
        timed = {who: t for who, t in timed.items() if math.isfinite(t) and not self.lines[who].get("problem")}
        return min(timed, key=lambda who: timed[who]) if timed else None

    def memory(self, peers: Sequence[str] = ()) -> tuple[float, str] | None:
        """Our memory over the least that a peer needs, and whose that is."""
        mine = self.lines.get("ours", {}).get("peak_mb")
        others = {
            who: line["peak_mb"]
            for who, line in self.lines.items()
            if who not in (*OURS, "numpy") and line.get("peak_mb") and (not peers or who in peers)
        }
        if mine is None or not others:
            return None
        least = min(others, key=lambda who: others[who])
        return mine / others[least], least

    def share(self, who: str = "ours") -> float | None:
        """Of the roof, as the whole file knows it."""
        line = self.lines.get(who)
        if not line or not line.get("work") or not self.roof or not math.isfinite(self.median(who)):
            return None
        return least_seconds(line["work"], self.roof, line["ceiling"], line["cold"])[0] / self.median(who)


def read(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a file; none where it does not exist. ValueError for a line that is not one of ours."""
    path = Path(path)
    found = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            line = json.loads(text)
        except ValueError:  # also where it is not UTF-8
            line = None
        if not isinstance(line, dict) or not {"op", "threads", "isa", "contestant"} <= set(line):
            raise ValueError(f"[bench] line {number} of {path} is not a measurement.")
        found.append(line)
    return found


def append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def key(line: dict[str, Any]) -> Key:
    return line["op"], line["case"], line["pass"] == PASSES[True], line["threads"]


def roofs(lines: Iterable[dict[str, Any]]) -> dict[tuple[int, str], dict[str, float]]:
    """{(threads, instruction set): the highest ceilings found}."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for line in lines:
        if line["op"] == "roof":
            at = line["threads"], line["isa"]
            found[at] = higher(found.get(at, {}), line["roof"])
    return found


def groups(lines: Sequence[dict[str, Any]]) -> dict[Key, Group]:
    """The last run of each row."""
    tops = roofs(lines)
    found: dict[Key, Group] = {}
    for line in lines:
        if line["op"] == "roof":
            continue
        at = key(line)
        if at not in found or found[at].run != line["run"]:
            found[at] = Group(at, line["run"])
        found[at].lines[line["contestant"]] = line
        if line["contestant"] == "ours":
            found[at].roof = tops.get((line["threads"], line["isa"]), {})
    return found


def machine(cpu: str) -> str:
    """A name for a file: the CPU and the number of cores this process may use."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\bcpu\b|processor|@.*", "", cpu.lower())).strip("-")
    return f"{name or platform.machine()}-{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
