"""`fastlm generate`, `chat` and `eval`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from fastlm.cli import parser
from fastlm.generate import Past
from fastlm.lm import LM, load
from fastlm.models.encoder_decoder import EncoderDecoder


def loaded(arguments: argparse.Namespace) -> LM:
    """The model, in the storage that the command line asks for."""
    lm = load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    if arguments.quantize:
        lm.quantize(arguments.quantize)
    if arguments.activations is not None:  # else what goes with the weights
        lm.activations = arguments.activations
    lm.cache = arguments.cache
    return lm


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def generate(arguments: argparse.Namespace) -> None:
    if arguments.beams > 1:
        usual = parser().parse_args(["generate", "MODEL", "PROMPT"])
        drawn = [f"--{name.replace('_', '-')}" for name in SAMPLING if getattr(arguments, name) != getattr(usual, name)]
        if drawn:
            raise ValueError(f"{', '.join(drawn)} must be left out with --beams {arguments.beams}: a beam search draws nothing")
    prompt = arguments.prompt
    if prompt == "-":
        prompt = standard_input().read()
    lm = loaded(arguments)
    before = "" if isinstance(lm.model, EncoderDecoder) else prompt  # of a source nothing is gone on with
    if arguments.beams > 1:
        options: Any = {"beams": arguments.beams, "stop": arguments.stop or None}
        print(before + lm.generate(prompt, max_tokens=arguments.max_tokens, **options))
        return
    show(lm, lm._encode(prompt), arguments.max_tokens, sampling(arguments), before)


def standard_input() -> TextIO:
    """Python has none where it was closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: there is nothing to read")
    return sys.stdin


def chat(arguments: argparse.Namespace) -> None:
    lm = loaded(arguments)
    messages: list[dict[str, str]] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.message is not None:
        messages.append({"role": "user", "content": arguments.message})
        answer(lm, messages, arguments)
        return
    if lm.tokenizer is None or lm.tokenizer.chat_template is None:
        raise ValueError(f"{arguments.model} has no chat template: use fastlm generate")
    standard_input()
    past = Past()
    print(f"{lm!r}\nAn empty line ends the talk.")
    while True:
        try:
            message = input("\nyou> ").strip()
        except EOFError:
            print()
            return
        if not message:
            return
        messages.append({"role": "user", "content": message})
        shorten(lm, messages, arguments.max_tokens)
        try:
            messages.append({"role": "assistant", "content": answer(lm, messages, arguments, past)})
        except KeyboardInterrupt:  # only this answer ends
            messages.pop()
            print()


def shorten(lm: LM, messages: list[dict[str, str]], max_tokens: int) -> None:
    """Forgets the oldest question and answer as long as the talk and the next answer do not fit the model's context."""
    assert lm.tokenizer is not None
    first = 1 if messages[0]["role"] == "system" else 0
    room = lm.model.config.context - max_tokens
    while len(messages) - first > 2 and len(lm.tokenizer.encode(lm.tokenizer.chat(messages), special_tokens=False)) > room:
        del messages[first : first + 2]


def answer(lm: LM, messages: list[dict[str, str]], arguments: argparse.Namespace, past: Past | None = None) -> str:
    return show(lm, lm._chat_ids(messages), arguments.max_tokens, sampling(arguments) | {"past": past})


def evaluate(arguments: argparse.Namespace) -> None:
    text = read(arguments.text)
    lm = loaded(arguments)
    if lm.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer: a text cannot be evaluated")
    ids = lm.tokenizer.encode(text)
    if arguments.max_tokens and len(ids) > arguments.max_tokens:
        ids = ids[: arguments.max_tokens]
        text = lm.tokenizer.decode(ids)
    context = arguments.context or min(lm.model.config.context, 2048)
    start = time.perf_counter()
    perplexity = lm.perplexity(ids, context=context, stride=arguments.stride or context)
    seconds = time.perf_counter() - start
    bits = math.log2(perplexity) * (len(ids) - 1) / max(1, len(text.encode()))
    guess = unigram(ids)
    print(f"perplexity {perplexity:.4f} (by token frequency alone: {math.exp(guess):.1f}), {bits:.4f} bits a byte")
    speed = f"{len(ids):,} tokens in {seconds:.1f} s, {len(ids) / seconds:,.0f} tokens/s"
    print(f"{speed}; context {context}, stride {arguments.stride or context}")


def sampling(arguments: argparse.Namespace) -> Any:
    """The options of `LM.stream` that the command line gives."""
    return {name: getattr(arguments, name) for name in SAMPLING} | {"stop": arguments.stop or None}


def show(lm: LM, prompt: list[int], max_tokens: int, options: Any, before: str = "") -> str:
    """Prints what follows a prompt as it comes, `before` before the first piece, then its speed on standard error. Returns it without
    `before`."""
    start, first, known, text = time.perf_counter(), 0.0, 0, ""
    ids: list[int] = []
    for piece in lm._stream(prompt, max_tokens, options, ids):
        if not text:
            first, known = time.perf_counter() - start, len(ids)
        print(piece if text else before + piece, end="", flush=True)
        text += piece
    if not text:
        print(before, end="")
    seconds = time.perf_counter() - start
    print()
    if len(ids) > known > 0:
        rate = (len(ids) - known) / max(seconds - first, 1e-9)
        print(f"[{len(ids)} tokens, first after {first:.2f} s, then {rate:.1f} tokens/s]", file=sys.stderr)
    return text


def read(path: str) -> str:
    """A text file, or an error that says what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def unigram(ids: Any, counted: Any = None) -> float:
    """Mean loss of guessing every token by its frequency, in `counted` or in the text itself: what any model must beat."""
    import numpy as np

    ids = np.asarray(ids)
    source = ids if counted is None else np.asarray(counted)
    counts = np.bincount(source, minlength=int(ids.max()) + 1).astype(float)
    if counted is not None:
        counts += 1.0  # a token that was never counted is possible
    return float(-np.log(counts[ids] / counts.sum()).mean())
