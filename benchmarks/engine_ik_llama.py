"""ik_llama.cpp by its own programs: llama-bench and, for batches, llama-batched-bench, in the folder that FASTLM_IK_LLAMA names. They say
how long they took; nothing of their start is counted."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import engine


class Run:
    """Calls the program; `times` are the seconds it reports, which the worker takes instead of its own."""

    def __init__(self, program, arguments, seconds):
        self.command = [str(Path(os.environ["FASTLM_IK_LLAMA"]) / program), *map(str, arguments)]
        self.seconds = seconds
        self.last = []

    def __call__(self):
        with tempfile.TemporaryDirectory() as folder:  # it writes a log where it runs
            done = subprocess.run(self.command, capture_output=True, text=True, check=True, cwd=folder)
        self.last = self.seconds(done.stdout + done.stderr)

    def times(self, seconds):
        self()
        return self.last


def found(case):
    program = os.environ.get("FASTLM_IK_LLAMA")
    return case["model"] == "smollm2" and program and engine.smollm2()


def label(case, count):
    return f"{case['kind']}, {count} threads, repacked"


def bench(case, test, work):
    """llama-bench: `test` is its option; runs of `work` ids."""

    def seconds(out):
        rows = [
            row
            for row in json.loads(out[out.index("[\n") : out.rindex("]") + 1])
            if row["n_prompt"] == work[0] and row["n_gen"] == work[1]
        ]
        return [s / 1e9 for s in rows[-1]["samples_ns"]]

    n = engine.threads()
    return engine.named(
        Run("llama-bench", ["-m", found(case), "-o", "json", "-t", n, "-r", 3, "-rtr", 1, *test], seconds), label(case, n)
    )


def decode(case):
    if not found(case):
        return None
    if case.get("batch", 1) == 1:
        return bench(case, ["-p", 0, "-n", 0, "-pg", f"{engine.PROMPT},{engine.NEW}"], (engine.PROMPT, engine.NEW))
    n, batch = engine.threads(), case["batch"]

    def seconds(out):
        """Of the line | PP | TG | B | N_KV | T_PP s | S_PP | T_TG s | S_TG | T s | S |, T."""
        lines = re.findall(r"^\|\s*\d+\s*\|.*\|$", out, re.M)
        return [float(line.split("|")[9]) for line in lines]

    arguments = [
        "-m",
        found(case),
        "-c",
        1024 * batch,
        "-b",
        2048,
        "-ub",
        512,
        "-t",
        n,
        "-npp",
        engine.PROMPT,
        "-ntg",
        engine.NEW,
        "-npl",
        batch,
    ]
    return engine.named(Run("llama-batched-bench", [*arguments, "-rtr"], seconds), label(case, n))


def prompt(case):
    if not found(case):
        return None
    return bench(case, ["-p", case["tokens"], "-n", 0], (case["tokens"], 0))
