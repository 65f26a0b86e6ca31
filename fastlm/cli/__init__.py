"""The command line: `fastlm demo | info | train | generate | chat | eval | bench | plan | verify | convert`.

An error is one line, `fastlm: ...`, and exit status 2; FASTLM_DEBUG=1 shows the traceback instead. Each command lives in a module that is
imported when it is called, so that `fastlm --help` is quick.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# ImportError is what fastlm._C raises for a FASTLM_ISA or FASTLM_NUM_THREADS that cannot be.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, NotImplementedError, OverflowError, ImportError)
LARGEST = (1 << 63) - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status."""
    try:
        arguments = parser().parse_args(argv)
        if arguments.threads:
            with unbroken():
                from fastlm import backend

            backend.set_num_threads(arguments.threads)
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("\nfastlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastlm info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED as error:
        if os.environ.get("FASTLM_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror and error.filename is not None:  # not "[Errno 2] No such ...: 'name'"
            message = f"{error.filename}: {error.strerror}"
        print(f"fastlm: {message}", file=sys.stderr)
        return 2


@contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C comes at the end: within NumPy's import it would be an ImportError, and tracebacks of NumPy's."""
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # where there are no handlers, and no Ctrl-C
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if pressed:
        raise KeyboardInterrupt


class _Help(argparse.HelpFormatter):
    """Says the default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default  # 0 is one to be said, unlike False
        shown = action.option_strings and default not in (None, [], argparse.SUPPRESS) and default is not False
        return f"{text} (default: %(default)s)".strip() if shown else text


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--threads", type=_positive, metavar="N", help="threads to compute with (default: the CPUs this process may use)"
    )
    top = argparse.ArgumentParser(prog="fastlm", description="Train, evaluate and run language models, fast, on the CPU you have.")
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, summary: str, run: str, details: str = "") -> argparse.ArgumentParser:
        def call(arguments: argparse.Namespace) -> int:
            import importlib

            name, function = run.split(":")
            with unbroken():
                module = importlib.import_module(f"fastlm.cli.{name}")
            return int(getattr(module, function)(arguments) or 0)

        p = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
            parents=[common],
            formatter_class=_Help,
        )
        p.set_defaults(run=call)
        return p

    p = command("demo", "train on a bundled text, then let a real model answer a question", "demo:run")
    p.add_argument("--steps", type=_positive, default=2000, help="training steps")
    p.add_argument("--out", default="runs/demo", help="folder of the trained model")
    p.add_argument("--question", default="What is the capital of France, and what is it known for?", help="for the real model")
    p.add_argument("--offline", action="store_true", help="only the first half")

    p = command("info", "what this machine offers and which kernel serves each operation", "info:run")
    p.add_argument("--roof", action="store_true", help="also measure this machine's ceilings (a second)")

    p = command(
        "train",
        "train a model on a text file",
        "train:run",
        "Ctrl-C saves and prints the command that goes on from there; the result is a Hugging Face folder.",
    )
    p.add_argument("text", metavar="TEXT", nargs="?", help="text file in UTF-8; with --resume the one it was started with")
    p.add_argument("--out", default="runs/model", help="folder for checkpoints, plot and model")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    p.add_argument(
        "--tokenizer", choices=["char", "bpe"], default="char", help="a token is a character, or a piece learned from the text"
    )
    p.add_argument("--vocab-size", type=_positive, metavar="N", help="for --tokenizer bpe (default: 2048)")
    p.add_argument(
        "--objective",
        choices=["causal", "masked", "next-sentence", "sentence-order", "replaced", "spans", "permutation"],
        default="causal",
        help="what is learnt: the next token; hidden tokens; these and how two pieces follow each other (lines are sentences, blank "
        "lines end documents); which tokens were replaced; spans cut out; tokens in any order",
    )
    p.add_argument(
        "--model",
        choices=["gpt2", "llama", "bert", "albert", "electra", "t5", "xlnet"],
        help="architecture (default: by the objective)",
    )
    p.add_argument("--whole-word", action="store_true", help="where tokens are hidden: words are hidden whole")
    p.add_argument(
        "--copies",
        type=_positive,
        metavar="N",
        help="as --whole-word: go round through N maskings of a text (default: always another)",
    )
    p.add_argument("--layers", type=_positive, default=4, help="transformer blocks")
    p.add_argument("--heads", type=_positive, default=4, help="attention heads of a block")
    p.add_argument("--width", type=_positive, default=128, help="of the model; a multiple of the heads")
    p.add_argument("--context", type=_positive, default=64, help="tokens that the model sees")
    p.add_argument("--batch", type=_positive, default=12, help="sequences in a step")
    p.add_argument("--accumulate", type=_positive, default=1, help="batches in a step")
    p.add_argument("--steps", type=_positive, default=2000, help="optimizer steps")
    p.add_argument("--lr", type=float, help="highest learning rate (default: by width, 2e-3 at 128)")
    p.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    p.add_argument("--weight-decay", type=float, default=0.1, help="pull of the matrices towards zero")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0 does not clip")
    p.add_argument("--held-out", type=float, default=0.1, help="share of the text that is kept for evaluation")
    p.add_argument("--eval-every", type=_positive, default=250, help="steps")
    p.add_argument("--save-every", type=_positive, default=500, help="steps")
    p.add_argument("--seed", type=_seed, default=1337, help="of the first weights and of the batches")
    _device(p, "weights and activations; float32 ones are kept beside them")

    p = command("generate", "continue a text", "text:generate")
    _model(p)
    p.add_argument("prompt", metavar="PROMPT", help="text to go on from; - reads standard input")
    _sampling(p, temperature=0.8, max_tokens=128)
    p.add_argument("--beams", type=_positive, default=1, help="beam search over this many continuations (not sampled)")

    p = command("chat", "talk to a model that has a chat template", "text:chat", "An empty line or Ctrl-D ends it.")
    _model(p)
    p.add_argument("--message", help="one message: print the answer and end")
    p.add_argument("--system", help="system message")
    _sampling(p, temperature=0.7, max_tokens=512)

    p = command("eval", "perplexity of a model on a text file", "text:evaluate")
    _model(p)
    p.add_argument("text", metavar="TEXT", help="text file in UTF-8")
    p.add_argument("--context", type=_positive, help="tokens that the model sees (default: the model's, at most 2048)")
    p.add_argument("--stride", type=_positive, help="tokens between two windows (default: the context)")
    p.add_argument("--max-tokens", type=_positive, help="only the first tokens of the text")

    p = command(
        "bench",
        "time operations and models against NumPy and the other engines that are installed",
        "bench:run",
        "Measures the table of targets, with all threads and with one, as far as the file of results does not hold it yet.",
    )
    p.add_argument("ops", metavar="OP", nargs="*", help="operations (default: those of the table)")
    p.add_argument("--all", action="store_true", help="every case of the operations, not the table's alone")
    p.add_argument("--quick", action="store_true", help="fewer cases and shorter turns")
    p.add_argument("--minutes", type=float, metavar="N", help="begin no row after this; the same command goes on from there")
    p.add_argument("--again", action="store_true", help="also measure what the file holds")
    p.add_argument("--json", metavar="FILE", help="append the JSON lines to this file (default: by date and machine)")
    p.add_argument("--plot", metavar="FILE", help="draw the roofline into this PNG or SVG file (default: beside the lines)")
    p.add_argument("--table", metavar="FILE", help="only print the table of this file of results")
    p.add_argument("--case", metavar="NAME", action="append", help="only cases whose name contains this; may be repeated")
    p.add_argument("--against", metavar="PEER", action="append", help="only this peer; may be repeated (default: all installed)")
    p.add_argument("--rounds", type=_positive, metavar="N", help="turns of each contestant (default: 5)")
    p.add_argument("--list", action="store_true", help="only list the operations, or the cases of those named, or of --case")

    p = command("plan", "what a published model costs: parameters, FLOPs, memory, and a layout over devices", "plan:run")
    p.add_argument("name", metavar="NAME", help="a preset, as in fastlm.models.PRESETS, or glam-1.2t")
    p.add_argument("--devices", type=_positive, default=8, metavar="N", help="accelerators to train on")
    p.add_argument("--memory", type=_positive, default=80, metavar="GB", help="of each device")
    p.add_argument("--context", type=_positive, metavar="T", help="tokens of a sequence (default: what the model was trained on)")
    p.add_argument("--layers", type=_positive, help="also run one training step here with so many layers")
    p.add_argument("--width", type=_positive, help="of the model that is run, a multiple of 16")

    p = command("verify", "compare a model's hidden states and logits with a reference, layer by layer", "verify:run")
    p.add_argument("folder", metavar="FOLDER", nargs="?", help="a Hugging Face folder or id, or a GGUF file")
    p.add_argument("--reference", metavar="NPZ", help="golden file: ids, embedding, layer.0 ..., final, logits (see --script)")
    p.add_argument("--tolerance", type=_distance, default=1e-5, help="largest error, relative to max(1, |value|)")
    p.add_argument("--script", action="store_true", help="only print the script that writes the reference with transformers")

    p = command("convert", "write a model as a Hugging Face folder", "convert:run", "Quantised weights become float32 or bfloat16.")
    p.add_argument("source", metavar="IN", help="a GGUF file, a llama2.c .bin file, or a Hugging Face folder")
    p.add_argument("target", metavar="OUT", help="folder to write; must not exist, or be empty")
    p.add_argument("--tokenizer", metavar="FILE", help="llama2.c tokenizer (tok512.bin, tokenizer.bin)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights written")
    return top


_KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_ROW", "LOSSLESS")


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a Hugging Face folder or id, or a GGUF file")
    p.add_argument(
        "--quantize", metavar="KIND", choices=_KINDS, help=f"put the weights into blocks: {', '.join(_KINDS)} (every bit kept)"
    )
    p.add_argument(
        "--activations",
        choices=["float32", "int8"],
        help="of quantised weights; int8 is faster (default: float32; int8 with Q8_ROW)",
    )
    p.add_argument("--cache", choices=["float32", "bfloat16", "int8"], default="float32", help="how keys and values are kept")
    _device(p, "weights (default: as they are stored)", None)


def _device(p: argparse.ArgumentParser, what: str, default: str | None = "float32") -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is: cuda is the GPU")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default=default, help=f"of {what}")


def _sampling(p: argparse.ArgumentParser, temperature: float, max_tokens: int) -> None:
    p.add_argument("--max-tokens", type=_positive, default=max_tokens, help="end after this many")
    p.add_argument("--temperature", type=float, default=temperature, help="0 always takes the likeliest token")
    p.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0 is all")
    p.add_argument("--top-p", type=float, default=0.95, help="only the likeliest tokens that make up this probability")
    p.add_argument("--min-p", type=float, default=0.0, help="only tokens at least this likely, relative to the likeliest")
    p.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same text")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _distance(text: str) -> float:
    """A number of at least 0; nan, with which every comparison fails, is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text[:40]!r}")
    return value


def _whole(text: str, low: int) -> int:
    """The number, or a refusal by argparse, which puts the option's name before it."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text[:40]!r}") from None
    if not low <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be {f'at least {low}' if value < low else 'below 2^63'}, got {text[:40]}")
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fastlm {version('fastlm')}"
    except PackageNotFoundError:  # a source tree
        import fastlm

        return f"fastlm {fastlm.__version__}"
