"""Sentencepiece's tokenizer.model, as LLaMA 1 and 2 have it: a protobuf of scored pieces (sentencepiece_model.proto), read by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastlm.tokenizers import build
from fastlm.tokenizers.build import SPACE
from fastlm.tokenizers.errors import TokenizerError, typed

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


def backend_from_sentencepiece(data: bytes, name: str) -> tuple[Backend, dict[str, str]]:
    """The `tokenizers` object and its special tokens by role. BPE and unigram models; `name` is for messages."""
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normal: dict[int, Any] = {}
    with typed(f"[from_folder] {name} is no sentencepiece model"):
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                kinds.append(piece.get(3, _NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normal = dict(_fields(value))
        vocab = {p: i for i, p in enumerate(pieces)}
        if not pieces or len(vocab) != len(pieces):
            raise TokenizerError(
                f"[from_folder] {name}: pieces must be there and differ, got {len(pieces)} with {len(vocab)} names"
            )
        unknown = next((i for i, k in enumerate(kinds) if k == _UNKNOWN), None)
        kind, prefix = trainer.get(3, _UNIGRAM), bool(normal.get(3, 1))
        if kind == _BPE:
            mergeable = {p: s for p, s, k in zip(pieces, scores, kinds, strict=True) if k in (_NORMAL, _UNUSED)}
            backend = build.scored_pieces(vocab, mergeable, None if unknown is None else pieces[unknown], prefix)
        elif kind == _UNIGRAM:
            backend = _unigram(list(zip(pieces, scores, strict=True)), unknown, bool(trainer.get(35, 0)), prefix)
        else:
            raise TokenizerError(f"[from_folder] {name}: the model must be BPE or unigram, got type {kind}")
        before: list[Any] = []
        if normal.get(2):
            before.append(normalizers.Precompiled(normal[2]))
        if normal.get(4, 1):  # spaces at the ends go, and runs become one
            before += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if before:
            after = [backend.normalizer] if backend.normalizer is not None else []
            backend.normalizer = normalizers.Sequence([*before, *after])
    build.add_tokens(
        backend,
        [p for p, k in zip(pieces, kinds, strict=True) if k in (_CONTROL, _UNKNOWN)],
        [p for p, k in zip(pieces, kinds, strict=True) if k == _USER],
    )
    ids = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43, -1)}
    special = {role: pieces[i] for role, i in ids.items() if 0 <= i < len(pieces) and kinds[i] in (_CONTROL, _UNKNOWN)}
    return backend, special


def _unigram(pieces: list[tuple[str, float]], unknown: int | None, byte_fallback: bool, prefix: bool) -> Backend:
    backend = Backend(models.Unigram(pieces, unk_id=unknown, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always" if prefix else "never", split=True)
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1, right=0)] if prefix else parts)
    return backend


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value of a protobuf message: int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield field, number - (1 << 64) if number >> 63 else number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at}, {len(data) - at} are left")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file ends inside a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value & ((1 << 64) - 1), at
    raise ValueError(f"a number of more than 10 bytes at byte {at}")
