"""Learning rates by step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, lr: float, min_lr: float, warmup: int) -> float:
    """The rate of update number `step` (from 0): linear up to lr over `warmup` updates, then half a cosine down to min_lr."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step >= steps:
        return min_lr
    progress = (step - warmup) / max(1, steps - warmup)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (lr - min_lr)
