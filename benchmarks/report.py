"""What is shown of measurements: a line for each row while they run, and the table of a file of results in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.benchmarks import results, targets
from fastlm.benchmarks.results import Group

if TYPE_CHECKING:
    from fastlm.benchmarks.harness import Row

NOT_DRAWN = "pip install 'fastlm[plot]' draws it, where there are measurements of a roof"
NAMES = {"ours": "fastlm", "ours_avx2": "fastlm on AVX2"}


def number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


# --- while it runs ---


def roof_line(roof: dict[str, float]) -> str:
    return f"roof: {roof['gflops']:.0f} GFLOP/s float32, {roof['read_gbs']:.1f} GB/s read, {roof['copy_gbs']:.1f} GB/s copy"


def heading(found: Sequence[str]) -> str:
    head = f"{'operation':<20} {'case':<34} {'pass':<5} t {'ms':>9} {'spread':>6} {'GFLOP/s':>8} {'GB/s':>6} {'roof':>5}"
    return head + "".join(f" {'/ ' + p:>14}" for p in found)


def line(row: Row, found: Sequence[str]) -> str:
    flops, size = row.work or (math.nan, math.nan)
    ms, passes = row.seconds * 1e3, "f + b" if row.backward else "f"
    wide = results.spread(row.rounds["ours"]) if row.rounds.get("ours") else math.nan
    text = f"{row.op:<20} {row.case[:34]:<34} {passes:<5} {row.threads} {number(ms, '.4g' if ms < 1e4 else '.0f'):>9}"
    text += f" {number(wide, '.0%'):>6} {number(flops / row.seconds / 1e9, '.1f'):>8} {number(size / row.seconds / 1e9, '.1f'):>6}"
    text += f" {number(row.share, '.0%'):>5}"
    for peer in found:
        ratio = row.ratio(peer)
        text += f" {('-' if ratio is None else f'{ratio:.2f}x'):>14}"
    if row.tokens and row.rounds:
        speeds = (
            f"{who} {row.tokens / row.median(who):,.0f}" + (f" ({row.setups[who]})" if who in row.setups else "")
            for who in row.rounds
        )
        text += "\n    tokens/s: " + ", ".join(speeds)
    if row.memory and shows_memory(row.op, row.case):
        text += "\n    peak MB: " + ", ".join(f"{who} {mb:,.0f}" for who, mb in row.memory.items())
    return text


def shows_memory(op: str, case: str) -> bool:
    return op in ("cross_entropy", "linear_cross_entropy") or (op == "model" and "-train-" in case)


# --- the table ---


def verdict(group: Group, bar: targets.Bar) -> tuple[str, bool | None]:
    """How the row stands to a bar, "torch 1.52x", and whether it is met; None where nothing can be said."""
    if group.lines["ours"].get("problem"):
        return "-", False
    if bar.memory:
        found = group.memory(bar.peers)
        return ("-", None) if found is None else (f"memory {found[0]:.2f}x of {found[1]}", found[0] <= bar.ratio)
    peer = group.best(bar.peers)
    ratio = group.ratio(peer) if peer else None
    return ("-", None) if ratio is None else (f"{peer} {ratio:.2f}x", ratio >= bar.ratio)


def cells(group: Group, target: targets.Target | None) -> list[str]:
    """A row of the table."""
    op, case, backward, _ = group.key
    mine = group.lines["ours"]
    stands = [verdict(group, bar) for bar in (target.bars if target else ()) or (targets.Bar(0.0),)]
    bars = target.bars if target else ()
    met = [{True: "yes", False: "**no**", None: "-"}[ok] for _, ok in stands] if bars else []
    small = group.ratio("ours_avx2")
    time = f"{number(mine['median_ms'], '.4g')} ms +- {number(mine['spread'] and 50 * mine['spread'], '.0f')} %"
    rate = f"{mine['rate']:,.4g} {mine['unit']}" if mine.get("rate") else "-"
    if shows_memory(op, case) and mine.get("peak_mb") is not None:
        rate += f", {mine['peak_mb']:,.0f} MB"
    return [
        op, f"`{case}`", "f + b" if backward else "f", time, rate, number(group.share(), ".0%"),
        ", ".join(text for text, _ in stands), ", ".join(map(str, bars)) or "-", ", ".join(met) or "-",
        "-" if small is None else f"{1 / small:.2f}x",
    ]  # fmt: skip


HEAD = ["op", "case", "pass", "fastlm", "rate", "of roof", "ratio to the best peer", "target", "met", "AVX2"]


def table(rows: Iterable[Sequence[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table of a file's lines: for each row the last run of it."""
    groups = {key: group for key, group in results.groups(lines).items() if "ours" in group.lines}
    if not groups:
        return "No measurements.\n"
    measured = [g for g in groups.values() if g.lines["ours"].get("median_ms") is not None]
    every = [line for g in groups.values() for line in g.lines.values()]
    versions = dict(sorted({k: v for line in every for k, v in line["versions"].items()}.items()))
    days, commits = (sorted({line[k] for line in every if line[k]}) for k in ("date", "commit"))
    out = [
        f"# {every[0]['cpu']}, {days[0][:10]}\n\n"
        "Medians of interleaved rounds, half their range; ratios are medians over the rounds of one run, above 1 fastlm is faster. "
        f"AVX2: its speed over that of the full instruction set. Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}; commits "
        f"{', '.join(commits) or 'unknown'}.\n"
    ]
    count = met = 0
    for threads in sorted({key[3] for key in groups}, reverse=True):
        mine = [g for g in measured if g.key[3] == threads]
        place = {key: i for i, key in enumerate(targets.BY_KEY)}
        mine.sort(key=lambda g: place.get(g.key[:3], len(place)))
        rows = []
        for group in mine:
            target = targets.BY_KEY.get(group.key[:3])
            rows.append(cells(group, target))
            for bar in target.bars if target else ():
                ok = verdict(group, bar)[1]
                count, met = count + (ok is not None), met + (ok is True)
        roof = next((g.roof for g in mine if g.roof), {})
        out.append(
            f"\n## {threads} thread{'s' if threads > 1 else ''}\n\n" + (f"The {roof_line(roof)}.\n\n" if roof else "") + table(rows)
        )
        left = [t for t in targets.TABLE if (*t.key, threads) not in groups]
        if left:
            names = ", ".join(f"{t.op} `{t.case}`{' f + b' if t.backward else ''}" for t in left)
            out.append(f"\nNot measured: {names}.\n")
    out.append(f"\n{met} of {count} targets met.\n")
    troubles = [
        f"- {g.key[0]} `{g.key[1]}`, {g.key[3]} threads: {NAMES.get(who, who)}: {line['problem']}\n"
        for g in groups.values()
        for who, line in g.lines.items()
        if line.get("problem") and line["problem"] != "cannot do this"
    ]
    if troubles:
        out.append("\n## What went wrong\n\n" + "".join(troubles))
    return "".join(out)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> bool:
    """The roofline, where matplotlib is; whether it was drawn."""
    try:
        from fastlm.benchmarks.roofline import draw as plot

        return plot(results.groups(lines), str(path))
    except ImportError:
        return False
