"""The models, one file each; `ARCHITECTURES` finds one by Hugging Face's model_type or GGUF's architecture."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from fastlm.models import gpt, llama
from fastlm.models.base import CausalLM
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.llama import Llama, LlamaConfig
from fastlm.nn import initialise

ARCHITECTURES: dict[str, ModuleType] = {gpt.HF_TYPE: gpt, llama.HF_TYPE: llama}
PRESETS: dict[str, Any] = {**gpt.PRESETS, **llama.PRESETS}


def module_of(config_or_model: Any) -> ModuleType:
    """The model file that a config or a model comes from."""
    for module in ARCHITECTURES.values():
        if isinstance(config_or_model, (module.Config, module.Model)):
            return module
    raise TypeError(f"[models] expected a config or a model of {', '.join(ARCHITECTURES)}, got {type(config_or_model).__name__}.")


def declare(config: Any) -> CausalLM:
    """The model of a config or of a preset's name, with declared shapes and no weights: for counting and loading."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"[models] preset must be one of {', '.join(PRESETS)}, got {config!r}.")
        config = PRESETS[config]
    model: CausalLM = module_of(config).Model(config)
    return model


def create(config: Any, seed: int = 0) -> CausalLM:
    """A new model with random weights, ready to train: GPT-2's scheme, std 0.02, and 0.02 / sqrt(2 L) into the residual stream."""
    model = declare(config)
    initialise(model, seed)
    return model


__all__ = ["ARCHITECTURES", "GPT", "PRESETS", "CausalLM", "GPTConfig", "Llama", "LlamaConfig", "create", "declare", "module_of"]
