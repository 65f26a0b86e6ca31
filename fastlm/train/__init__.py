"""Training. `fastlm.train(...)` is the generator; the package holds its parts."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from fastlm.train.checkpoint import checkpoints
from fastlm.train.joint import Distilled, Electra, student_of, teacher
from fastlm.train.loop import Step, evaluate, read_log, train
from fastlm.train.optimizer import AdamW
from fastlm.train.schedule import default_lr, warmup_cosine
from fastlm.train.sources import flops_per_token


class _Callable(ModuleType):
    """`fastlm.train` names this package and the function in it: the package can be called, whoever imports it first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

__all__ = [
    "AdamW",
    "Distilled",
    "Electra",
    "Step",
    "checkpoints",
    "default_lr",
    "evaluate",
    "flops_per_token",
    "read_log",
    "student_of",
    "teacher",
    "train",
    "warmup_cosine",
]
