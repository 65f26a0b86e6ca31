"""Checkpoints of a training run: folders step-N that appear complete or not at all; the newest two are kept."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm import backend, hub
from fastlm.checkpoint import read_json, read_safetensors, write_json, write_safetensors
from fastlm.models.base import LanguageModel
from fastlm.train.optimizer import AdamW

KEPT = 2


def checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [(int(m[1]), p) for p in Path(out).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [p for _, p in sorted(found)]


def parts(model: Any) -> dict[str, LanguageModel]:
    """The models that a checkpoint holds, by the folder inside it; "" is the checkpoint's own."""
    saved: dict[str, LanguageModel] = getattr(model, "saved", {"": model})
    return saved


def write(out: Path, step: int, model: Any, optimizer: AdamW, tokenizer: Any, settings: Mapping[str, Any]) -> Path:
    """Writes step-N: a Hugging Face folder that `fastlm.load` opens, with optimizer.safetensors and training.json in it."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"step-{step:06d}"
    staging = Path(tempfile.mkdtemp(prefix=f"step-{step:06d}.tmp", dir=out))
    try:
        for name, part in parts(model).items():
            (staging / name).mkdir(exist_ok=True)
            hub.write_files(part, tokenizer if part is parts(model)[""] else None, staging / name)
        write_safetensors(staging / "optimizer.safetensors", optimizer.state())
        state = {"step": step, "updates": optimizer.updates, "settings": dict(settings)}
        write_json(staging / "training.json", state)
        hub.replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in [*checkpoints(out)[:-KEPT], *out.glob("step-*.tmp*")]:  # and what a crash left half written
        shutil.rmtree(old, ignore_errors=True)
    return target


def restore(folder: Path, model: Any, optimizer: AdamW, settings: Mapping[str, Any]) -> int:
    """Puts a checkpoint back, bit for bit; returns its step. ValueError where what decides the batches is not the same."""
    state = read_json(folder / "training.json")
    differing = {k: (v, settings[k]) for k, v in state["settings"].items() if k in settings and settings[k] != v}
    if differing:
        listed = ", ".join(f"{k} was {was!r}, is {now!r}" for k, (was, now) in differing.items())
        raise ValueError(f"[resume] {folder} is of another run: {listed}.")
    for place, part in parts(model).items():
        saved, _ = hub.load_folder_or_gguf(folder / place)
        if saved.config != part.config:
            raise ValueError(f"[resume] {folder / place} is of another model: {saved.config}, not {part.config}.")
        ours = part.named_parameters()
        for name, p in saved.named_parameters().items():
            backend.assign(ours[name].data, backend.put(p.data, backend.device_of(ours[name].data)))
    optimizer.restore(read_safetensors(folder / "optimizer.safetensors"), int(state["updates"]))
    return int(state["step"])
