"""`fastlm info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import fastlm
from fastlm import _C, backend, cuda
from fastlm.generate import recorded


def gpu() -> str:
    """What is there, or why nothing can be used."""
    usable, what = cuda.status()
    if not usable:
        return f"none: {what}"
    return f"{what}; {cuda.device().images.says}"  # type: ignore[attr-defined]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(arguments: argparse.Namespace) -> None:
    others = [i for i in _C.isas() if i != _C.isa()]
    chosen = "chosen by FASTLM_ISA" if os.environ.get("FASTLM_ISA") else "the best this CPU runs"
    libraries = ", ".join(f"{p} {version(p)}" for p in ("numpy", "safetensors", "tokenizers"))
    rows = [
        ("fastlm", f"{fastlm.__version__}, in {Path(fastlm.__file__).parent}"),
        ("CPU", _C.cpu_name()),
        ("features", " ".join(_C.cpu_features()) or "none of those that are looked for"),
        ("ISA", f"{_C.isa()}, {chosen}; FASTLM_ISA={'|'.join(others)} forces another" if others else f"{_C.isa()}, {chosen}"),
        ("threads", f"{backend.num_threads()} of {os.cpu_count()} CPUs; FASTLM_NUM_THREADS=N or --threads N sets it"),
        (
            "decoding",
            f"steps are {'recorded, FASTLM_RECORD=0 turns that off' if recorded.enabled() else 'not recorded: FASTLM_RECORD=0'}",
        ),
        ("GPU", gpu()),
        ("memory", f"{_C.cached_bytes() / 1e6:.1f} MB kept for reuse"),
        ("versions", f"Python {platform.python_version()}, {libraries}"),
    ]
    if arguments.roof:
        roof = backend.roof()
        compute = f"{roof['gflops']:.0f} GFLOP/s float32, {roof['int8_gops']:.0f} int8"
        rows.append(("roof", f"{compute}, read {roof['read_gbs']:.1f} GB/s, copy {roof['copy_gbs']:.1f} GB/s"))
    for name, value in rows:
        print(f"{name:<10} {value}")
    print("\noperation              kernel")
    for op in sorted(o for o in _C.ops if o != "roof"):
        print(f"{op:<22} cpu/{_C.isa()}")
