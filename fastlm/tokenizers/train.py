"""Vocabularies made here: byte-level BPE trained on a text, and one token a character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastlm.tokenizers import build
from fastlm.tokenizers.errors import TokenizerError, check_unicode, typed

END = "<|endoftext|>"


def trained_bpe(texts: Iterable[str | Path], vocab_size: int, special_tokens: Sequence[str] = (END,)) -> Backend:
    """Byte-level BPE with GPT-2's word pattern. A str is a text, a Path is a file of text."""
    least = 256 + len(special_tokens)
    if not hasattr(vocab_size, "__index__"):
        raise TypeError(f"[train_bpe] vocab_size must be an integer, got {vocab_size!r:.60}")
    if not least <= vocab_size < 1 << 31:
        raise TokenizerError(
            f"[train_bpe] vocab_size must be at least {least}, 256 bytes and {len(special_tokens)} special tokens, and below 2^31, "
            f"got {vocab_size}"
        )
    if isinstance(texts, (str, Path)):
        texts = [texts]
    backend = build.byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=int(vocab_size),
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with typed("[train_bpe]"):
        backend.train_from_iterator((_text(t) for t in texts), trainer)
    return backend


def _text(text: str | Path) -> str:
    if not isinstance(text, (str, Path)):
        raise TokenizerError(f"[train_bpe] texts must be strs and Paths, got {type(text).__name__}")
    if isinstance(text, str):
        check_unicode("[train_bpe]", text)
        return text
    try:
        return text.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise TokenizerError(f"[train_bpe] {text} is not UTF-8 text: byte {e.start}: {e.reason}") from None


def character_backend(text: str) -> Backend:
    """One token for each distinct character, in code point order. BPE without merges: the library is fastest so."""
    if not isinstance(text, str):
        raise TypeError(f"[characters] text must be a str, got {type(text).__name__}")
    if not text:
        raise TokenizerError("[characters] text is empty")
    check_unicode("[characters]", text)
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(sorted(set(text)))}, merges=[]))
    backend.decoder = decoders.Fuse()
    return backend
