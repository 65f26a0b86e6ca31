"""`fastlm bench`."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> int:
    from fastlm.benchmarks import harness

    a = arguments
    if a.list:
        names = a.ops or harness.operations()
        print(
            "\n".join(f"{op} {harness.label(op, i)}" for op, cases in harness.selected(names).items() for i in cases)
            if a.ops
            else "\n".join(names)
        )
        return 0
    return int(harness.main(a.ops, a.threads, a.quick, a.json, a.plot, a.case or (), a.rounds, a.against or ()))
