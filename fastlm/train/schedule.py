"""Learning rates by step."""

from __future__ import annotations

import math


def default_lr(d_model: int) -> float:
    """A highest rate for AdamW by the model's width: 2e-3 at 128, 1e-3 at 384, 6e-4 at 768.

    A power law through what is published for 384 (nanoGPT) and 768 (Brown et al. 2020, arXiv:2005.14165, table 2.1).
    """
    return float(2e-3 * (128 / d_model) ** (2 / 3))


def warmup_cosine(step: int, steps: int, lr: float, min_lr: float, warmup: int) -> float:
    """The rate of update number `step` (from 0): linear up to lr over `warmup` updates, then half a cosine down to min_lr."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step >= steps:
        return min_lr
    progress = (step - warmup) / max(1, steps - warmup)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (lr - min_lr)
