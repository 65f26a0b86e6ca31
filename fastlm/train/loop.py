"""The training loop, as a generator: evaluating, saving and stopping are ordinary Python in the body of the `for`."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import backend, nn
from fastlm.checkpoint import atomic_write
from fastlm.data import Corpus, Labelled, Objective
from fastlm.ops import check
from fastlm.tensor import no_grad
from fastlm.tokenizers import Tokenizer
from fastlm.train import checkpoint
from fastlm.train.ondevice import DeviceStep
from fastlm.train.optimizer import AdamW
from fastlm.train.recorded import HostStep
from fastlm.train.schedule import default_lr, warmup_cosine
from fastlm.train.sources import Cost, Data, cost, means, source


@dataclass(frozen=True)
class Step:
    """One update. `step` counts from 1. `grad_norm` is that before clipping. `skipped`: loss or gradient was not finite. `memory`: the
    most bytes of arrays at once, the parameters and the optimiser's among them."""

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
    memory: int = 0
    device: str = "cpu"

    @property
    def roof_share(self) -> float:
        """Useful multiply-adds as a share of what this machine can do; the first use measures the machine (0.3 s). nan on a GPU, whose
        ceiling nothing here has measured."""
        if self.device != "cpu":
            return math.nan
        return self.flops_per_second / (backend.roof()["gflops"] * 1e9)

    def record(self) -> dict[str, Any]:
        """What goes into log.jsonl."""
        keys = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "validation_loss", "skipped")
        return {k: getattr(self, k) for k in keys if getattr(self, k) not in (None, False)}


def train(
    model: Any,
    data: Data,
    *,
    steps: int,
    objective: Objective | None = None,
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
    recompute: bool = False,
    device: Any = None,
    dtype: str = "float32",
) -> Generator[Step, None, None]:
    """Trains the model in place, one `Step` for each update: AdamW, warm-up and cosine, clipping by norm. Parts that were frozen
    (`model.embeddings.freeze()`) stay as they are; a model that is frozen as a whole is trained as a whole.

    lr: the highest rate (default: by width, see default_lr); min_lr: the last (lr / 10).

    data: a Corpus or its folder, a token array, Documents, Labelled examples for an encoder's task head, or a function from a batch's
    number to a Batch, whose fields are the arguments of the model's loss. objective: what is learnt from text, one of fastlm.data
    (default, for causal models: the next token). batch sequences of `context` tokens (default: the model's, at most 512 where nothing
    in it sets a limit) make a forward pass; `accumulate` of these make an update. eval_every: how often the objective's loss over the
    held-out data is taken (at most eval_batches batches), and after the last step. out: a folder for log.jsonl and, every
    save_every steps, at the end, and where the loop is left early (`break`, Ctrl-C), a checkpoint. resume: go on from the newest checkpoint
    in `out`, if there is one; the result is that of an uninterrupted run, bit for bit. Without it `out` must hold no checkpoint:
    the newest two are kept, and those of another run would be taken for this one's. tokenizer: saved with the checkpoints.
    recompute: a block's activations are not kept but computed again in the backward pass: less memory, a quarter more time, the same
    bits; not for models with experts, encoder-decoders and XLNet. device: "cuda" or "cpu", where the model is put first; None:
    where it is. dtype: "bfloat16", on a GPU, for weights and activations; the optimiser's weights and all gradients of weights are
    float32, and so are the model's when the loop ends and in checkpoints.

    A step whose loss or gradient is not finite changes nothing, is marked `skipped` and warned of. Raises ValueError at once for
    arguments that cannot be.
    """
    _check_model(model)
    whole = partial(check.integer, "train", low=1, high=check.WORD, wrong=ValueError)
    longest = int(getattr(model, "max_tokens", model.config.context))
    context = (longest if longest < 1 << 16 else 512) if context is None else whole("context", context)
    if context > longest:
        raise ValueError(f"[train] context must be from 1 to the model's {longest}, got {context}.")
    steps, batch, accumulate = whole("steps", steps), whole("batch", batch), whole("accumulate", accumulate)
    warmup, seed = whole("warmup", warmup, low=0), check.seed("train", seed, ValueError)
    eval_every, save_every = whole("eval_every", eval_every, low=0), whole("save_every", save_every, low=0)
    eval_batches = None if eval_batches is None else whole("eval_batches", eval_batches)
    peak = check.number("train", "lr", default_lr(model.config.d_model) if lr is None else lr, 0.0, check.MOST, above=0.0)
    last = peak / 10 if min_lr is None else check.number("train", "min_lr", min_lr, 0.0, check.MOST)
    clip = None if clip is None else check.number("train", "clip", clip, 0.0, above=0.0)
    eps = check.number("train", "eps", eps, 0.0, check.MOST, above=0.0)  # 0 gives nan where a gradient has been 0 from the start
    weight_decay = check.number("train", "weight_decay", weight_decay, 0.0, check.MOST)
    if np.shape(betas) != (2,) or not all(check.number("train", "betas", beta, 0.0, 1.0) < 1 for beta in betas):
        raise ValueError(f"[train] betas must be two numbers from 0 to below 1, got {betas!r}.")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"[train] tokenizer must be a fastlm.Tokenizer, which checkpoints hold, got {type(tokenizer).__name__}.")
    if (resume or save_every) and out is None:
        raise ValueError("[train] out must be a folder where save_every or resume is given.")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"[train] out must be a folder, got the file {out}.")
    if out is not None and not resume and (found := checkpoint.checkpoints(out)):
        raise ValueError(
            f"[train] out must be a folder without checkpoints, got {out} with {found[-1].name} of a run: resume=True goes on with "
            "that one, or give another folder."
        )
    batches = source(model, data, objective, batch, context, seed, eval_batches)
    if eval_every and batches.held_out is None:
        raise ValueError(
            "[train] eval_every needs held-out data: give a Corpus with a validation part longer than the context, for sentence pairs "
            "one of several documents; or Labelled examples with a `validation`."
        )
    if recompute:
        nn.check_recompute(model)
    half = _place(model, device, dtype)
    _wake(model)
    optimizer = AdamW(model, betas, eps, weight_decay)
    there = None if model.device is None else DeviceStep(model, optimizer, accumulate, clip)
    here = HostStep(model, optimizer, accumulate)
    settings: dict[str, Any] = {"seed": seed, "batch": batch, "context": context, "accumulate": accumulate}
    if objective is not None:
        settings["objective"] = repr(objective)
    folder, costs = None if out is None else Path(out), cost(model)

    def run() -> Generator[Step, None, None]:
        if recompute:
            nn.recompute(model)
        if half:
            optimizer.halve()
        try:
            yield from updates()
        finally:
            if recompute:
                nn.recompute(model, False)
            optimizer.finish()
            backend.release()

    def updates() -> Generator[Step, None, None]:
        first = 0
        if resume and folder is not None and (found := checkpoint.checkpoints(folder)):
            with optimizer.exact():
                first = checkpoint.restore(found[-1], model, optimizer, settings)
            optimizer.refresh()
        log = None if folder is None else Log(folder, first)
        saved = first

        def save(step: int) -> None:
            nonlocal saved
            if folder is not None and step != saved:
                with optimizer.exact():
                    checkpoint.write(folder, step, model, optimizer, tokenizer, settings)
                saved = step

        for n in range(first, steps):
            start = time.perf_counter()
            backend.reset_peak()
            rate = warmup_cosine(n, steps, peak, last, warmup)
            before, interrupted = optimizer.updates, None
            try:
                loss, norm, tokens, flops = _update(optimizer, batches.batch, costs, n, accumulate, rate, clip, there, here)
            except KeyboardInterrupt:
                if there is None and optimizer.updates == before:  # this update has written nothing yet
                    save(n)
                raise
            seconds, memory = time.perf_counter() - start, backend.memory()["peak"] if there is None else there.device.memory()
            validation = None
            if batches.held_out is not None and eval_every and ((n + 1) % eval_every == 0 or n + 1 == steps):
                try:
                    validation = mean_loss(model, batches.held_out())
                except KeyboardInterrupt as e:
                    interrupted = e
            step = Step(
                n + 1, steps, loss, rate, norm, tokens / seconds, flops / seconds, seconds * (steps - n - 1),
                validation, not math.isfinite(loss + norm), memory, "cpu" if there is None else there.device.name,
            )  # fmt: skip
            if step.skipped:
                warnings.warn(f"[train] step {n + 1} skipped: loss {loss}, gradient norm {norm}", RuntimeWarning, stacklevel=2)
            if log is not None:
                log.write(step.record())
            if (save_every and (n + 1) % save_every == 0) or n + 1 == steps or interrupted is not None:
                save(n + 1)
            if interrupted is not None:
                raise interrupted
            try:
                yield step
            except GeneratorExit:  # the loop was left early
                save(n + 1)
                raise

    return run()


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = ": give its `model`" if hasattr(model, "model") else ""
        raise TypeError(f"[train] model must be one of fastlm.models, got {type(model).__name__}{hint}.")
    if bare := next((k for k, p in model.named_parameters().items() if isinstance(p.data, nn.Declared)), None):
        raise ValueError(
            f"[train] model must have weights, {bare} has none yet: fastlm.models.create makes them, declare does not."
        )


def _wake(model: Any) -> None:
    """Every parameter wants a gradient, but for those that were frozen beside others that were not."""
    parameters = model.named_parameters().values()
    frozen = [p for p in parameters if not p.requires_grad]
    model.train()
    if len(frozen) < len(parameters):
        for p in frozen:
            p.requires_grad = False


def _place(model: Any, device: Any, dtype: str) -> bool:
    """Puts the model where it is trained; whether it computes in bfloat16 there."""
    if dtype not in backend.DTYPES:
        raise ValueError(f"[train] dtype must be 'float32' or 'bfloat16', got {dtype!r}.")
    where = model.device if device is None else backend.device(device)
    if where is None and dtype != "float32":
        raise ValueError(f"[train] dtype must be 'float32' on the CPU, got {dtype!r}: bfloat16 is trained on a GPU, device='cuda'.")
    if where is not None and not hasattr(model, "to"):
        raise NotImplementedError(f"[train] {type(model).__name__} is trained on the CPU alone.")
    if where is not model.device or (where is not None and dtype == "bfloat16"):
        model.to(where, "float32")
    return dtype == "bfloat16"


def _update(
    optimizer: AdamW,
    batches: Callable[[int], Any],
    costs: Cost,
    n: int,
    accumulate: int,
    lr: float,
    clip: float | None,
    there: DeviceStep | None,
    here: HostStep,
) -> tuple[float, float, int, float]:
    """One update from `accumulate` batches: their mean loss, the gradient's norm, tokens and floating-point operations."""
    tokens, flops = 0, 0.0
    given = [batches(n * accumulate + i) for i in range(accumulate)]
    for b in given:
        if not hasattr(b, "_asdict"):
            raise TypeError(
                f"[train] data must give Batches, NamedTuples of the arguments of the model's loss, got {type(b).__name__}."
            )
    if there is not None:
        total, norm = there(given, lr)
    else:
        optimizer.zero_grad()
        total = here(given)
        norm = optimizer.update(lr, clip) if math.isfinite(total) else math.nan
        optimizer.zero_grad()
    for batch in given:
        used = costs(batch)
        tokens, flops = tokens + used[0], flops + used[1]
    return total / accumulate, norm, tokens, flops


def evaluate(
    model: Any, data: Data, batch: int, context: int, limit: int | None = None, objective: Objective | None = None, seed: int = 0
) -> float:
    """Mean loss of the objective (default: the next token) over a token array, in windows that do not overlap, or over the held-out
    part of a Corpus; at most `limit` batches. What is drawn is drawn from the seed, the same every time. Labelled: over its examples.
    """
    batch = check.integer("evaluate", "batch", batch, 1, wrong=ValueError)
    context = check.integer("evaluate", "context", context, 1, wrong=ValueError)
    limit = None if limit is None else check.integer("evaluate", "limit", limit, 1, wrong=ValueError)
    seed = check.seed("evaluate", seed, ValueError)
    if isinstance(data, Labelled):
        whole = source(model, replace(data, validation=data), None, batch, context, seed, limit)
    else:
        held = data.validation if isinstance(data, Corpus) else np.asarray(data)
        if held.ndim != 1 or held.dtype.kind not in "iu":
            raise ValueError(f"[evaluate] data must be a Corpus, Labelled, or (n,) integers, got {held.dtype} {held.shape}.")
        whole = source(model, Corpus(held, held, int(held.max(initial=0)) + 1), objective, batch, context, seed, limit)
    if whole.held_out is None:
        raise ValueError(f"[evaluate] data must be longer than the context of {context}.")
    return mean_loss(model, whole.held_out())


def mean_loss(model: Any, batches: Iterable[Any]) -> float:
    """Over all that is asked in the batches, so that it does not matter how they were cut; nan where nothing is."""
    totals: dict[int, float] = {}
    counts: dict[int, int] = {}
    with no_grad():
        for batch in batches:
            for i, (loss, n) in enumerate(means(model, batch)):
                if n:
                    totals[i] = totals.get(i, 0.0) + loss().item() * n
                    counts[i] = counts.get(i, 0) + n
    return float(sum(total / counts[i] for i, total in totals.items())) if totals else math.nan


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
