"""Token files: text encoded once, packed into one memory-mapped file with a manifest beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1
_PIECE = 1 << 20  # characters encoded at a time


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and tokens held out: memory-mapped (n,) uint16 or uint32."""

    train: NDArray[Any]
    validation: NDArray[Any]
    vocab_size: int

    def __repr__(self) -> str:
        return f"Corpus({len(self.train):,} tokens to train on, {len(self.validation):,} held out, vocabulary {self.vocab_size:,})"


def prepare(
    text: str,
    encode: Callable[[str], Sequence[int]],
    folder: str | os.PathLike[str],
    vocab_size: int,
    validation: float = 0.1,
) -> Corpus:
    """Encodes a text into `folder`: tokens.bin and manifest.json. The last part of the text is held out.

    text: the text itself (read a file with Path.read_text). encode: text -> ids below vocab_size. validation: the share of the
    characters held out. Atomic: the folder appears complete or not at all; one that is there is replaced if it holds a corpus.
    Raises ValueError for an empty text, a share outside [0, 1), an id outside the vocabulary, or a folder of something else.
    """
    target = Path(folder)
    if not isinstance(text, str):
        raise TypeError(f"[prepare] text must be a str, got {type(text).__name__}: read a file with Path.read_text.")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)) or not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"[prepare] vocab_size must be an integer from 1 to 2^32, got {vocab_size!r}.")
    if not text:
        raise ValueError("[prepare] text must not be empty.")
    if not 0 <= validation < 1:
        raise ValueError(f"[prepare] validation must be from 0 to below 1, got {validation}.")
    if target.exists() and not (target / "manifest.json").exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"[prepare] {target} holds something other than tokens: give another folder.")
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    cut = round(len(text) * (1 - validation))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        counts = []
        with open(staging / "tokens.bin", "wb") as file:
            for part in (text[:cut], text[cut:]):
                count = 0
                for piece in _pieces(part):
                    ids = np.asarray(encode(piece))
                    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                        raise ValueError(f"[prepare] encode must give a list of integers, got {ids.dtype} {ids.shape}.")
                    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
                        raise ValueError(f"[prepare] ids must be from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}.")
                    file.write(ids.astype(dtype).tobytes())
                    count += ids.size
                counts.append(count)
            file.flush()
            os.fsync(file.fileno())
        manifest = {"version": VERSION, "dtype": dtype.str, "train": counts[0], "validation": counts[1]}
        manifest["vocab_size"] = int(vocab_size)
        with open(staging / "manifest.json", "w", encoding="utf-8") as file_:
            json.dump(manifest, file_, indent=1)
            file_.flush()
            os.fsync(file_.fileno())
        staging.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / "replaced")
            shutil.rmtree(old, ignore_errors=True)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_corpus(target)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at the end of a line before a word, where no usual tokenizer joins what is on both sides."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        while end < len(text) and not (text[end - 1] == "\n" and not text[end].isspace()):
            end += 1
        yield text[start:end]
        start = end


def open_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """The corpus that `prepare` wrote. Raises ValueError where the manifest and the file disagree."""
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, dtype = manifest["version"], np.dtype(manifest["dtype"])
        train, validation, vocab_size = (int(manifest[k]) for k in ("train", "validation", "vocab_size"))
    except FileNotFoundError:
        raise FileNotFoundError(f"[open_corpus] {path} has no manifest.json: write one with fastlm.data.prepare.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"[open_corpus] {path / 'manifest.json'} is not a manifest: {error}") from None
    if version != VERSION or dtype.str not in ("<u2", "<u4") or min(train, validation) < 0:
        raise ValueError(f"[open_corpus] {path / 'manifest.json'}: version must be {VERSION} and dtype <u2 or <u4, got {manifest}.")
    size, expected = (path / "tokens.bin").stat().st_size, (train + validation) * dtype.itemsize
    if size != expected:
        raise ValueError(f"[open_corpus] {path / 'tokens.bin'} must have {expected} bytes by its manifest, got {size}.")
    tokens = np.memmap(path / "tokens.bin", dtype, "r") if size else np.zeros(0, dtype)
    return Corpus(tokens[:train], tokens[train:], vocab_size)
