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
_SHARED = 1 << 12  # characters before and behind a cut that are in both pieces


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

    text: the text itself (read a file with Path.read_text). encode: text -> ids below vocab_size; the two parts have the ids that it
    gives of each, [CLS] at the beginning and [SEP] at the end where it puts them there. validation: the share of the characters held
    out. Atomic: the folder appears complete or not at all; one that is there is replaced if it holds a corpus.
    Raises ValueError for an empty text, a share outside [0, 1), an id outside the vocabulary, or a folder of something else.
    """
    target = Path(folder)
    if not isinstance(text, str):
        raise TypeError(f"[prepare] text must be a str, got {type(text).__name__}: read a file with Path.read_text.")
    if not callable(encode):
        raise TypeError(f"[prepare] encode must be a function from text to ids, tokenizer.encode, got {type(encode).__name__}.")
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
                before = file.tell()
                for ids in _encoded(part, lambda piece: _checked(encode(piece), vocab_size)) if part else ():
                    if ids is None:  # the pieces do not fit: what is written of this part is void
                        file.seek(before)
                        file.truncate()
                    else:
                        file.write(ids.astype(dtype).tobytes())
                counts.append((file.tell() - before) // dtype.itemsize)
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


def _checked(given: Any, vocab_size: int) -> NDArray[Any]:
    """What encode gave, as an array of ids."""
    ids = np.asarray(given)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"[prepare] encode must give a list of integers, got {ids.dtype} {ids.shape}.")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"[prepare] ids must be from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}.")
    return ids


def _encoded(text: str, encode: Callable[[str], NDArray[Any]]) -> Iterator[NDArray[Any] | None]:
    """The ids of encode(text), a piece at a time: what it puts around a text, or at its beginning, stands there once.

    Neighbouring pieces share some text. Its ids alone end as the left piece does and begin as the right one; where both hold at once,
    what is further away does not matter, and one goes over into the other. Where nothing does, None, and then the whole text at once.
    """
    cuts = list(_cuts(text))
    left = encode(text[: cuts[0] + _SHARED] if cuts else text)
    start = 0  # of what is taken from the left piece
    for number, cut in enumerate(cuts):
        right = encode(text[max(0, cut - _SHARED) : cuts[number + 1] + _SHARED if number + 1 < len(cuts) else len(text)])
        shared = encode(text[max(0, cut - _SHARED) : cut + _SHARED])
        ends, begins = _common(left[::-1], shared[::-1]), _common(right, shared)
        middle = (len(shared) - ends + begins) // 2
        stop = len(left) - len(shared) + middle
        if ends + begins < len(shared) + len(shared) // 4 or stop < start:
            yield None
            yield encode(text)
            return
        yield left[start:stop]
        left, start = right, middle
    yield left[start:]


def _common(a: NDArray[Any], b: NDArray[Any]) -> int:
    """How many ids two lists begin with together."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def _cuts(text: str) -> Iterator[int]:
    """Where a text is cut: at the ends of lines before a word."""
    at = _PIECE
    while at < len(text):
        if text[at - 1] == "\n" and not text[at].isspace():
            yield at
            at += _PIECE
        else:
            at += 1


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
