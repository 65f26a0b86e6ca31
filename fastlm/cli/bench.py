"""`fastlm bench`."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> int:
    from fastlm.benchmarks import harness

    if arguments.list:
        print("\n".join(harness.operations()))
        return 0
    return int(harness.main(arguments.ops, arguments.threads, arguments.quick, arguments.json, arguments.plot))
