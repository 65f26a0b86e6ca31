"""The tokenizer.bin of llama2.c: scored pieces, one after another."""

from __future__ import annotations

import struct
from pathlib import Path

from tokenizers import Tokenizer as Backend

from fastlm.tokenizers import build
from fastlm.tokenizers.build import SPACE
from fastlm.tokenizers.errors import TokenizerError

BOS, EOS, UNK = "<s>", "</s>", "<unk>"  # ids 1, 2, 0


def backend_from_llama2c(path: Path) -> Backend:
    """int32 longest piece; then for each piece float32 score, int32 length, bytes (llama2.c tokenizer.py `export`)."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise TokenizerError(f"[from_llama2c] {path} cannot be read: {e}") from e
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            raise TokenizerError(f"[from_llama2c] {path} ends inside piece {len(pieces)}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise TokenizerError(f"[from_llama2c] {path}: piece {len(pieces)} has {length} bytes, {len(data) - at} are left")
        try:
            pieces.append(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError as e:
            raise TokenizerError(f"[from_llama2c] {path}: piece {len(pieces)} is not UTF-8: {e}") from e
        scores.append(score)
        at += length
    if len(pieces) < 259:
        raise TokenizerError(f"[from_llama2c] {path} holds {len(pieces)} pieces, expected 3 special, 256 bytes and more")
    names = [UNK, BOS, EOS, *(f"<0x{b:02X}>" for b in range(256)), *(p.replace(" ", SPACE) for p in pieces[259:])]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names):
        raise TokenizerError(f"[from_llama2c] {path}: a piece occurs twice")
    backend = build.scored_pieces(vocab, dict(zip(names[259:], scores[259:], strict=True)), UNK)
    build.add_tokens(backend, [UNK, BOS, EOS])
    build.surround(backend, BOS, None)
    return backend
