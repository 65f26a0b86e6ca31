"""fastlm: train, fine-tune, evaluate and run language models, fast, on the CPU you have.

    lm = fastlm.load("folder, .gguf file or hub id")
    lm.generate("Once upon a time", max_tokens=32)
    for step in fastlm.train(...): ...

Everything is imported when it is first used, so that `import fastlm` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm import ops, train
    from fastlm.generate import Past
    from fastlm.lm import LM, load
    from fastlm.tensor import Tensor, no_grad
    from fastlm.tokenizers import Tokenizer

__version__ = "0.1.0"
__all__ = ["LM", "Past", "Tensor", "Tokenizer", "__version__", "load", "no_grad", "ops", "train"]

_HOME = {"LM": "lm", "load": "lm", "Past": "generate", "Tensor": "tensor", "no_grad": "tensor", "Tokenizer": "tokenizers"}
_MODULES = ("backend", "checkpoint", "data", "evaluate", "generate", "hub", "models", "nn", "ops", "tensor", "tokenizers", "train")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"fastlm.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastlm.{name}")
    else:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
