"""`fastlm train`: text -> tokenizer -> packed tokens -> model -> checkpoints, plot and folder."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlm import backend
from fastlm.cli import objectives, parser
from fastlm.cli.progress import Progress, clock, plot
from fastlm.cli.text import read, unigram
from fastlm.data import Corpus, open_corpus, prepare
from fastlm.lm import LM
from fastlm.models import CausalLM
from fastlm.nn import count_parameters
from fastlm.ops import check
from fastlm.tokenizers import Tokenizer
from fastlm.train import checkpoints, default_lr, evaluate, read_log, train

# What a run is; --resume takes these from the run's folder.
SETTINGS = """text objective whole_word copies tokenizer vocab_size model layers heads width context batch accumulate steps
    lr warmup weight_decay clip held_out eval_every save_every seed""".split()


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    backend.device(arguments.device)  # says at once that there is none
    if arguments.device == "cpu" and arguments.dtype != "float32":
        raise ValueError(f"--dtype must be float32 on the CPU, got {arguments.dtype}: bfloat16 is trained on a GPU, --device cuda")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {out}")
    if arguments.resume:
        if not (out / "run.json").exists():
            raise FileNotFoundError(f"{out} holds no run to go on with: {out / 'run.json'} is missing")
        go_on(arguments, json.loads((out / "run.json").read_text(encoding="utf-8")))
    elif arguments.text is None:
        raise ValueError("train needs a text file (or --resume with the --out of a run)")
    elif (out / "run.json").exists():
        raise ValueError(f"{out} holds a run: go on with it by --resume, or give another --out")
    check_numbers(arguments)
    lm, finished = train_text(None if arguments.resume else read(arguments.text), arguments)
    if not finished:
        return 130
    if isinstance(lm.model, CausalLM):
        print(f"\nTry: fastlm generate {shlex.quote(str(out / 'model'))} {shlex.quote(_word(lm, open_corpus(out / 'tokens')))}")
    return 0


def check_numbers(arguments: argparse.Namespace) -> None:
    """ValueError for those that `train` and `prepare` would refuse, before anything is read, written or printed."""
    if arguments.lr is not None:
        check.number("train", "--lr", arguments.lr, 0.0, check.MOST, above=0.0)
    check.integer("train", "--warmup", arguments.warmup, 0, wrong=ValueError)
    check.number("train", "--weight-decay", arguments.weight_decay, 0.0, check.MOST)
    check.number("train", "--clip", arguments.clip, 0.0)
    if not 0 <= arguments.held_out < 1:
        raise ValueError(f"[train] --held-out must be from 0 to below 1, got {arguments.held_out}.")


def go_on(arguments: argparse.Namespace, run: dict[str, Any]) -> None:
    """Takes a run's settings; what an older run does not have keeps its default. ValueError where the command line asks for others."""
    usual = parser().parse_args(["train"])
    asked = {name: getattr(arguments, name) for name in run if getattr(arguments, name, None) != getattr(usual, name, None)}
    if differing := [f"{name} was {run[name]!r}, is {value!r}" for name, value in asked.items() if value != run[name]]:
        raise ValueError(f"--resume goes on with what the run was started with, but {', '.join(differing)}: leave that out")
    for name, value in run.items():
        setattr(arguments, name, value)


def train_text(text: str | None, arguments: argparse.Namespace) -> tuple[LM, bool]:
    """Trains on a text, or goes on in arguments.out where it is None. Returns the model and whether it was not interrupted."""
    out = Path(arguments.out)
    objectives.check(arguments)
    if text is not None:
        tokenizer = objectives.tokenizer(text, arguments)
        size = tokenizer.vocab_size
        corpus = prepare(text, lambda t: tokenizer.encode(t, special_tokens=False), out / "tokens", size, arguments.held_out)
        if len(corpus.train) <= arguments.context:
            raise ValueError(f"the text has only {len(corpus.train)} tokens to train on, the context is {arguments.context}")
        most = max(len(corpus.train), 1024)  # a row begins at a token: more would be the same ones again
        if arguments.batch > most:
            raise ValueError(
                f"--batch must be at most {most:,}: the text has {len(corpus.train):,} tokens to train on, got {arguments.batch:,}"
            )
        tokenizer.save(out / "tokenizer")
    else:
        tokenizer, corpus = Tokenizer.from_folder(out / "tokenizer"), open_corpus(out / "tokens")
    objective, model = objectives.objective(tokenizer, arguments), objectives.model(arguments, tokenizer.vocab_size)
    lm = LM(getattr(model, "model", model), tokenizer)
    guess = describe(model, corpus, objective, arguments)
    evaluated = objectives.holds_out(model, corpus, objective, arguments)

    finished = True
    steps = train(
        model, corpus, objective=objective, context=arguments.context,
        steps=arguments.steps, batch=arguments.batch, lr=arguments.lr, warmup=arguments.warmup,
        weight_decay=arguments.weight_decay, clip=arguments.clip or None, accumulate=arguments.accumulate, seed=arguments.seed, out=out,
        eval_every=arguments.eval_every if evaluated else 0, save_every=arguments.save_every,
        eval_batches=20, resume=text is None, tokenizer=tokenizer, device=arguments.device, dtype=arguments.dtype,
    )  # fmt: skip
    if text is not None:  # now that nothing was refused: a folder with a run.json is not begun again
        settings = {name: getattr(arguments, name) for name in SETTINGS}
        (out / "run.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    started = time.perf_counter()
    done = 0
    with interruptible() as interrupted, Progress(arguments.steps) as progress:
        for step in steps:
            progress.show(step)
            done = step.step
            if interrupted():
                finished = done == arguments.steps
                break
    steps.close()  # saves where the loop was left early
    seconds = time.perf_counter() - started
    if not finished:
        saved = checkpoints(out)[-1]
        there = "" if arguments.device == "cpu" else f" --device {arguments.device} --dtype {arguments.dtype}"
        print(
            f"\nstopped after step {done}, saved in {saved}. Go on with:\n  fastlm train --resume --out {shlex.quote(str(out))}{there}"
        )
        return lm, False
    report(lm, model, corpus, objective, arguments, guess, seconds)
    return lm, True


def describe(model: Any, corpus: Corpus, objective: Any, arguments: argparse.Namespace) -> float:
    """Says what is trained on what; returns the loss of guessing by frequency."""
    held = corpus.validation if len(corpus.validation) else corpus.train
    guess = unigram(held, corpus.train) if objective is None else objectives.guess(model, corpus, objective, arguments)
    roof = backend.roof()
    print(
        f"text       {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} held out, vocabulary {corpus.vocab_size:,}"
    )
    print(
        f"model      {arguments.model}, {arguments.objective}, {count_parameters(model):,} parameters: {arguments.layers} layers, "
        f"{arguments.heads} heads, width {arguments.width}, context {arguments.context}"
    )
    there = backend.device(arguments.device)
    ours = f"{backend.isa()}, {backend.num_threads()} threads, {roof['gflops']:.0f} GFLOP/s at most"
    print(f"machine    {ours if there is None else there.name + ', ' + arguments.dtype}")
    blind = objectives.blind(model, corpus, objective)
    print(f"to beat    loss {blind:.3f} guessing blindly, {guess:.3f} guessing by frequency\n", flush=True)
    return guess


def report(lm: LM, model: Any, corpus: Corpus, objective: Any, arguments: argparse.Namespace, guess: float, seconds: float) -> None:
    """What came out: losses beside the baseline, plot, model folder, sample."""
    out = Path(arguments.out)
    print(f"\ntrained in {clock(seconds)}")
    held = None
    if objectives.holds_out(model, corpus, objective, arguments):
        held = evaluate(model, corpus, arguments.batch, arguments.context, objective=objective, seed=arguments.seed)
        perplexity = math.inf if held > 709 else math.exp(held)  # nan stays
        per_token = f", perplexity {perplexity:.2f} a token" if objective is None else ""
        print(f"held-out   loss {held:.4f} (by frequency {guess:.4f}){per_token}, over the whole held-out text")
    records = read_log(out)
    picture = plot(records, guess, out / "loss.png")
    print(f"plot       {picture}" if picture else "plot       none: pip install 'fastlm[plot]' draws it")
    lm.save(out / "model")
    print(f"model      {out / 'model'}, a Hugging Face folder")
    last = held if held is not None else records[-1]["loss"] if records else 0.0
    if not math.isfinite(last):
        rate = default_lr(arguments.width) if arguments.lr is None else arguments.lr
        raise ValueError(
            f"the loss is not finite: this model is of no use. Train one with an --lr below {rate:g}, in another --out"
        )
    if not isinstance(lm.model, CausalLM):
        objectives.show(lm, corpus, objective, arguments)
        return
    if arguments.context < 2:
        return  # no room for a prompt and what follows
    print("\nIt writes:")
    length = min(300, arguments.context * 4)
    print(_opening(lm), end="")
    for piece in continuation(lm, length, arguments.seed):
        print(piece, end="", flush=True)
    print()


def _word(lm: LM, corpus: Corpus) -> str:
    """A prompt: the text's first word, which may come after a page of blanks."""
    assert lm.tokenizer is not None
    for begin in range(0, len(corpus.train), 40):
        if words := lm.tokenizer.decode(corpus.train[begin : begin + 40]).split():
            return str(words[0])
    return _opening(lm)


def _opening(lm: LM) -> str:
    """A line break starts a text, if the tokenizer knows it."""
    assert lm.tokenizer is not None
    for text in ("\n", " "):
        try:
            if lm.tokenizer.encode(text, special_tokens=False):
                return text
        except ValueError:
            continue
    return str(lm.tokenizer.decode([0]))


def continuation(lm: LM, length: int, seed: int) -> Iterator[str]:
    """A text longer than the context: the window slides by halves."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(_opening(lm), special_tokens=False)
    context = lm.model.config.context
    decoder = lm.tokenizer.decode_stream(ids)
    made = 0
    while made < length:
        window = ids[-(context // 2) :] if len(ids) >= context else ids
        count = min(length - made, max(1, context - len(window)))
        new = lm.generate_ids(window, max_tokens=count, temperature=0.8, top_p=0.95, seed=seed + made)
        for i in new:
            yield decoder.put(i)
        ids, made = ids + new, made + len(new)
    yield decoder.finish()


@contextmanager
def interruptible() -> Iterator[Any]:
    """The first Ctrl-C is remembered and told by the yielded function; the second one interrupts as usual."""
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("\nstopping after this step ...", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
