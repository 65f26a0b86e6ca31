"""The models, one file each: every module here that has an HF_TYPE. `ARCHITECTURES` finds one by Hugging Face's model_type or
GGUF's architecture, `PRESETS` a published configuration by its name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fastlm import backend
from fastlm.checkpoint import QuantizedArray
from fastlm.models import gpt, llama
from fastlm.models.base import CausalLM, LanguageModel
from fastlm.models.encoder import Encoder
from fastlm.models.encoder_decoder import EncoderDecoder
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.llama import Llama, LlamaConfig
from fastlm.nn import initialise

_found = (import_module(f"{__name__}.{path.stem}") for path in sorted(Path(__file__).parent.glob("[a-z]*.py")))
ARCHITECTURES: dict[str, ModuleType] = {module.HF_TYPE: module for module in _found if hasattr(module, "HF_TYPE")}
PRESETS: dict[str, Any] = {name: config for module in ARCHITECTURES.values() for name, config in module.PRESETS.items()}


def module_of(config_or_model: Any) -> ModuleType:
    """The model file that a config or a model comes from."""
    for module in ARCHITECTURES.values():
        if type(config_or_model) in (module.Config, module.Model):
            return module
    raise TypeError(f"[models] expected a config or a model of {', '.join(ARCHITECTURES)}, got {type(config_or_model).__name__}.")


def preset(name: str, **changes: Any) -> Any:
    """The Config of a published model by its name, with fields changed: preset("gpt2", n_layer=2)."""
    if name not in PRESETS:
        near = [p for p in PRESETS if p.startswith(f"{name}-")] or difflib.get_close_matches(str(name).lower(), PRESETS, 4)
        advice = f" The nearest: {', '.join(near)}." if near else ""
        raise ValueError(f"[models] preset must be one of {', '.join(PRESETS)}, got {name!r:.60}.{advice}")
    fields = [field.name for field in dataclasses.fields(PRESETS[name])]
    if unknown := [key for key in changes if key not in fields]:
        raise ValueError(f"[models] {name} has no {', '.join(unknown)}; its fields are {', '.join(fields)}.")
    return dataclasses.replace(PRESETS[name], **changes)


def declare(config: Any) -> Any:
    """The model of a config or of a preset's name, with declared shapes and no weights: for counting and loading."""
    if isinstance(config, str):
        config = preset(config)
    return module_of(config).Model(config)


def create(config: Any, seed: int = 0, device: Any = "cpu", dtype: str | None = None) -> Any:
    """A new model with random weights, ready to train: GPT-2's scheme, std 0.02, and 0.02 / sqrt(2 L) into the residual stream.

    device: "cpu" or "cuda": the same weights there. dtype: see LanguageModel.to."""
    where = backend.device(device)  # which says at once that there is no GPU
    model = declare(config)
    initialise(model, seed)
    return model if where is None and dtype is None else model.to(where, dtype)


def with_head(
    model: Encoder, head: str | None, labels: Sequence[str] = ("LABEL_0", "LABEL_1"), problem: str | None = None, seed: int = 0
) -> Any:
    """A copy of an encoder with another head, which is drawn anew, as is all that the old one had no use for (a pooler): what a task is
    learnt on, float32. labels: the names of what it tells apart; problem: see heads.SequenceClassifier."""
    if not isinstance(model, Encoder):
        raise TypeError(f"[with_head] model must be an encoder, got {type(model).__name__}.")
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"[with_head] labels must be a list of names, got {labels!r:.60}.")
    new = create(dataclasses.replace(model.config, head=head, labels=tuple(labels), problem=problem), seed)
    new.pooling, new.token_ids = model.pooling, model.token_ids
    theirs = model.named_parameters()
    for name, p in new.named_parameters().items():
        if name in theirs and not name.startswith("head."):
            given = theirs[name].data
            given = given.dequantize() if isinstance(given, QuantizedArray) else given
            backend.assign(p.data, backend.put(given, backend.device_of(p.data)))
    return new


__all__ = [
    "ARCHITECTURES",
    "GPT",
    "PRESETS",
    "CausalLM",
    "Encoder",
    "EncoderDecoder",
    "GPTConfig",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "create",
    "declare",
    "gpt",
    "llama",
    "module_of",
    "preset",
    "with_head",
]
