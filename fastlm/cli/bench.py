"""`fastlm bench`."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(arguments: argparse.Namespace) -> int:
    from fastlm.benchmarks import harness, report, results

    a = arguments
    if a.table:
        if not Path(a.table).exists():
            raise FileNotFoundError(f"[bench] no such file: {a.table}")
        lines = results.read(a.table)
        if not lines:
            raise ValueError(f"[bench] {a.table} has no measurements.")
        print(report.markdown(lines), end="")
        if a.plot and not report.draw(lines, Path(a.plot)):
            raise RuntimeError(f"[bench] {a.plot} is not drawn: {report.NOT_DRAWN}")
        return 0
    if a.list:
        names, chosen = a.ops or harness.operations(), a.case or ()
        print(
            "\n".join(f"{op} {harness.label(op, i)}" for op, cases in harness.selected(names, chosen).items() for i in cases)
            if a.ops or chosen
            else "\n".join(names)
        )
        return 0
    return int(
        harness.main(
            a.ops, a.threads, quick=a.quick, everything=a.all, output=a.json, plot=a.plot, wanted=a.case or (), rounds=a.rounds,
            against=a.against or (), again=a.again, minutes=a.minutes,
        )
    )  # fmt: skip
