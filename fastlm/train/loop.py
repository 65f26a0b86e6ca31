"""The training loop, as a generator: evaluating, saving and stopping are ordinary Python in the body of the `for`."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.checkpoint import atomic_write
from fastlm.data import Batch, Corpus, Loader, open_corpus, windows
from fastlm.models.base import CausalLM
from fastlm.tensor import no_grad
from fastlm.train import checkpoint
from fastlm.train.optimizer import AdamW
from fastlm.train.schedule import default_lr, warmup_cosine

Data = Corpus | Array | str | os.PathLike[str] | Callable[[int], Batch]


@dataclass(frozen=True)
class Step:
    """One update. `step` counts from 1. `grad_norm` is that before clipping. `skipped`: loss or gradient was not finite."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    flops_per_second: float
    seconds_left: float
    validation_loss: float | None = None
    skipped: bool = False

    @property
    def roof_share(self) -> float:
        """Useful multiply-adds as a share of what this machine can do; the first use measures the machine (0.3 s)."""
        return self.flops_per_second / (backend.roof()["gflops"] * 1e9)

    def record(self) -> dict[str, Any]:
        """What goes into log.jsonl."""
        keys = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "validation_loss", "skipped")
        return {k: getattr(self, k) for k in keys if getattr(self, k) not in (None, False)}


def train(
    model: CausalLM,
    data: Data,
    *,
    steps: int,
    batch: int = 12,
    context: int | None = None,
    lr: float | None = None,
    min_lr: float | None = None,
    warmup: int = 100,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    clip: float | None = 1.0,
    accumulate: int = 1,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    eval_every: int = 0,
    eval_batches: int | None = None,
    save_every: int = 0,
    resume: bool = False,
    tokenizer: Any = None,
) -> Generator[Step, None, None]:
    """Trains the model in place, one `Step` for each update: AdamW, warm-up and cosine, clipping by norm.

    lr: the highest rate (default: by width, see default_lr); min_lr: the last (lr / 10).

    data: a Corpus or its folder, a token array, or a function from a batch's number to a Batch. batch sequences of `context`
    tokens (default: the model's) make a forward pass; `accumulate` of these make an update. eval_every: how often the loss over
    the held-out tokens is taken (at most eval_batches batches), and after the last step. out: a folder for log.jsonl and, every
    save_every steps, at the end, and where the loop is left early (`break`), a checkpoint. resume: go on from the newest checkpoint
    in `out`, if there is one; the result is that of an uninterrupted run, bit for bit. tokenizer: saved with the checkpoints.

    A step whose loss or gradient is not finite changes nothing, is marked `skipped` and warned of. Raises ValueError at once for
    arguments that cannot be.
    """
    context = context or int(model.config.context)
    for name, value, low in (("steps", steps, 1), ("batch", batch, 1), ("accumulate", accumulate, 1), ("warmup", warmup, 0)):
        if not isinstance(value, int) or value < low:
            raise ValueError(f"[train] {name} must be an integer of at least {low}, got {value!r}.")
    if not 0 < context <= model.config.context:
        raise ValueError(f"[train] context must be from 1 to the model's {model.config.context}, got {context}.")
    peak = default_lr(model.config.d_model) if lr is None else lr
    if not peak > 0 or (clip is not None and not clip > 0):
        raise ValueError(f"[train] lr and clip must be positive, got {peak} and {clip}.")
    if (resume or save_every) and out is None:
        raise ValueError("[train] out must be a folder where save_every or resume is given.")
    if not getattr(model, "predicts_next", True):
        raise ValueError(
            f"[train] {type(model).__name__} sees the tokens that it would predict here. Train it step by step with "
            "model.loss(ids, targets, perm_mask=..., target_mapping=...)."
        )
    source, held_out = _sources(data, batch, context, seed, model.config.vocab_size)
    if eval_every and held_out is None:
        raise ValueError("[train] eval_every needs held-out tokens: give a Corpus with a validation part longer than the context.")
    model.train()
    optimizer = AdamW(model, betas, eps, weight_decay)
    settings = {"seed": seed, "batch": batch, "context": context, "accumulate": accumulate}
    folder = None if out is None else Path(out)
    tokens, flops = accumulate * batch * context, flops_per_token(model, context)

    def run() -> Generator[Step, None, None]:
        first = 0
        if resume and folder is not None and (found := checkpoint.checkpoints(folder)):
            first = checkpoint.restore(found[-1], model, optimizer, settings)
        log = None if folder is None else Log(folder, first)
        for n in range(first, steps):
            start = time.perf_counter()
            rate = warmup_cosine(n, steps, peak, peak / 10 if min_lr is None else min_lr, warmup)
            loss, norm = _update(model, optimizer, source, n, accumulate, rate, clip)
            seconds = time.perf_counter() - start
            validation = None
            if held_out is not None and eval_every and ((n + 1) % eval_every == 0 or n + 1 == steps):
                validation = evaluate(model, held_out, batch, context, eval_batches)
            step = Step(
                n + 1, steps, loss, rate, norm, tokens / seconds, flops * tokens / seconds, seconds * (steps - n - 1),
                validation, not math.isfinite(loss + norm),
            )  # fmt: skip
            if step.skipped:
                warnings.warn(f"[train] step {n + 1} skipped: loss {loss}, gradient norm {norm}", RuntimeWarning, stacklevel=2)
            if log is not None:
                log.write(step.record())
            saved = folder is None
            if folder is not None and ((save_every and (n + 1) % save_every == 0) or n + 1 == steps):
                checkpoint.write(folder, n + 1, model, optimizer, tokenizer, settings)
                saved = True
            try:
                yield step
            except GeneratorExit:  # the loop was left early
                if folder is not None and not saved:
                    checkpoint.write(folder, n + 1, model, optimizer, tokenizer, settings)
                raise

    return run()


def _update(
    model: CausalLM, optimizer: AdamW, source: Callable[[int], Batch], n: int, accumulate: int, lr: float, clip: float | None
) -> tuple[float, float]:
    """One update from `accumulate` batches: their mean loss, and the gradient's norm."""
    model.zero_grad()
    total = 0.0
    share = np.array(1.0 / accumulate, np.float32)
    for i in range(accumulate):
        batch = source(n * accumulate + i)
        loss = model.loss(batch.tokens, batch.targets)
        loss.backward(share)
        total += loss.item()
    if not math.isfinite(total):
        return total / accumulate, math.nan
    return total / accumulate, optimizer.update(lr, clip)


def evaluate(model: CausalLM, tokens: Array, batch: int, context: int, limit: int | None = None) -> float:
    """Mean loss over held-out tokens in windows that do not overlap; at most `limit` batches."""
    total, count = 0.0, 0
    with no_grad():
        for b in windows(tokens, batch, context, limit):
            total += model.loss(b.tokens, b.targets).item() * b.targets.size
            count += b.targets.size
    return float(total / count)


def flops_per_token(model: CausalLM, context: int) -> float:
    """Multiply-adds count as two. 6 for every weight that multiplies (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and for
    causal attention's two products, which see half of the context on average: 6 L H D T (Chowdhery et al. 2022, appendix B, halved)."""
    c = model.config
    matrices = sum(p.size for k, p in model.named_parameters().items() if p.ndim == 2 and "embedding" not in k)
    head = c.vocab_size * c.d_model if model.head is None else 0
    return float(6.0 * (matrices + head) + 6.0 * c.n_layer * c.n_head * c.head_dim * context)


def _sources(data: Data, batch: int, context: int, seed: int, vocab_size: int) -> tuple[Callable[[int], Batch], Array | None]:
    """Where batches come from, and the held-out tokens if there are enough for one window."""
    if callable(data):
        return data, None
    corpus = open_corpus(data) if isinstance(data, (str, os.PathLike)) else data
    if not isinstance(corpus, Corpus):
        tokens = np.asarray(corpus)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"[train] data must be a Corpus, its folder, or (n,) integers, got {tokens.dtype} {tokens.shape}.")
        corpus = Corpus(tokens, tokens[:0], vocab_size)
    if corpus.vocab_size > vocab_size:
        raise ValueError(f"[train] the model's vocab_size must be at least the data's {corpus.vocab_size}, got {vocab_size}.")
    held_out = corpus.validation if len(corpus.validation) > context else None
    return Loader(corpus.train, batch, context, seed).batch, held_out


class Log:
    """log.jsonl: one object a line. What a resumed run makes again is cut off first."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        kept = [r for r in read_log(folder) if r["step"] <= step] if step else []
        atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl, in order; a last line that a crash cut is left out."""
    path = Path(folder) / "log.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
