"""The tokenizer inside a GGUF file's metadata (keys `tokenizer.ggml.*`, GGUF specification of ggml)."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from tokenizers import Tokenizer as Backend

from fastlm.tokenizers import build, patterns
from fastlm.tokenizers.build import SPACE
from fastlm.tokenizers.errors import TokenizerError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

# Control tokens that end a turn or a text in the model families that have them; GGUF names one id or two, these models use more.
_ENDS = frozenset(
    [
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<|return|>",
        "<EOT>",
    ]
)


def backend_from_gguf(metadata: Mapping[str, Any]) -> tuple[Backend, dict[str, str], list[int]]:
    """The `tokenizers` object, the special tokens by role, and the ids that end a text."""
    reader = _Reader(metadata)
    kind = reader.string("model")
    tokens = reader.tokens()
    types = reader.numbers("token_type", len(tokens), [_NORMAL] * len(tokens))
    if kind == "gpt2":
        backend, roles = _bpe(reader, tokens), {}
    elif kind == "llama":
        backend, roles = _scored(reader, tokens, types), {"bos": 1, "eos": 2, "unk": 0}
    elif kind == "bert":
        backend, tokens = _word_piece(tokens, types)
        roles = {}
    else:
        raise TokenizerError(f"[from_gguf] tokenizer.ggml.model must be gpt2, llama or bert, got {kind!r}")
    build.add_tokens(
        backend,
        [t for t, k in zip(tokens, types, strict=True) if k in (_CONTROL, _UNKNOWN)],
        [t for t, k in zip(tokens, types, strict=True) if k == _USER],
    )
    ids: dict[str, int] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot"), ("mask", "mask")):
        index = reader.index(f"{key}_token_id", len(tokens), roles.get(role))
        if index is not None:
            ids[role] = index
    pre = metadata.get("tokenizer.ggml.pre")
    bos = (
        ids.get("bos")
        if reader.flag("add_bos_token", kind == "llama" or (kind == "gpt2" and pre in patterns.IGNORE_MERGES))
        else None
    )
    eos = ids.get("eos") if reader.flag("add_eos_token", False) else None
    if kind != "bert":
        build.surround(backend, None if bos is None else tokens[bos], None if eos is None else tokens[eos])
    ends = [ids[r] for r in ("eos", "eot") if r in ids]
    ends += [i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k == _CONTROL and t in _ENDS]
    return backend, {role: tokens[i] for role, i in ids.items() if role != "eot"}, ends


def _bpe(reader: _Reader, tokens: list[str]) -> Backend:
    pre = reader.string("pre", "default")
    if pre not in patterns.PATTERNS:
        raise TokenizerError(f"[from_gguf] tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(patterns.PATTERNS))}")
    merges = []
    for line in reader.strings("merges"):
        left, found, right = line[1:].partition(" ")  # the first character may itself be a space
        if not found:
            raise TokenizerError(f"[from_gguf] a merge must be two tokens and a space between, got {line!r}")
        merges.append((line[:1] + left, right))
    vocab = {t: i for i, t in enumerate(tokens)}
    return build.byte_level(vocab, merges, patterns.PATTERNS[pre], pre in patterns.IGNORE_MERGES)


def _scored(reader: _Reader, tokens: list[str], types: list[float]) -> Backend:
    scores = reader.numbers("scores", len(tokens))
    mergeable = {t: float(s) for t, s, k in zip(tokens, scores, types, strict=True) if k in (_NORMAL, _UNUSED) and t}
    unknown = next((t for t, k in zip(tokens, types, strict=True) if k == _UNKNOWN), None)
    return build.scored_pieces({t: i for i, t in enumerate(tokens)}, mergeable, unknown, reader.flag("add_space_prefix", True))


def _word_piece(tokens: list[str], types: list[float]) -> tuple[Backend, list[str]]:
    """In GGUF the pieces that begin a word carry the mark and the others do not: the reverse of `##`."""
    words = []
    for token, kind in zip(tokens, types, strict=True):
        if kind != _NORMAL or (token.startswith("[") and token.endswith("]")):
            words.append(token)
        else:
            words.append(token[1:] if token.startswith(SPACE) else "##" + token)
    words = _distinct(words)
    plain = "".join(w for w, k in zip(words, types, strict=True) if k == _NORMAL and not w.startswith("["))
    cased = any("A" <= c <= "Z" for c in plain)  # GGUF does not say; an uncased vocabulary holds no such letter
    unk = next((w for w in words if w in ("[UNK]", "<unk>")), None)
    if unk is None:
        raise TokenizerError("[from_gguf] a bert vocabulary must hold [UNK], got none")
    return build.word_piece({w: i for i, w in enumerate(words)}, unk, lowercase=not cased), words


class _Reader:
    """Checked access to `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def _get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def string(self, key: str, default: str | None = None) -> str:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise TokenizerError(f"[from_gguf] tokenizer.ggml.{key} must be a string, got {_short(value)}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key)
        values = list(value) if hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping)) else None
        if values is None or not all(isinstance(v, str) for v in values):
            raise TokenizerError(f"[from_gguf] tokenizer.ggml.{key} must be an array of strings, got {_short(value)}")
        return values

    def tokens(self) -> list[str]:
        tokens = self.strings("tokens")
        if not tokens:
            raise TokenizerError("[from_gguf] tokenizer.ggml.tokens is empty")
        return _distinct(tokens)

    def numbers(self, key: str, length: int, default: list[int] | None = None) -> list[float]:
        value = self._get(key)
        if value is None and default is not None:
            return list(default)
        if value is None or isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) != length:
            raise TokenizerError(
                f"[from_gguf] tokenizer.ggml.{key} must be an array of {length} numbers, one a token, got {_short(value)}"
            )
        try:
            return [float(v) for v in value]
        except (TypeError, ValueError):
            raise TokenizerError(f"[from_gguf] tokenizer.ggml.{key} must hold numbers, got {_short(value)}") from None

    def index(self, key: str, length: int, default: int | None) -> int | None:
        value = self._get(key)
        if value is None:
            return default if default is not None and default < length else None
        if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < 2**32:
            raise TokenizerError(f"[from_gguf] tokenizer.ggml.{key} must be a token id below {length}, got {_short(value)}")
        return int(value) if int(value) < length else None  # files write 2^32 - 1, or an id past the end, for none

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is not None and not isinstance(value, Integral):  # a bool is one
            raise TokenizerError(f"[from_gguf] tokenizer.ggml.{key} must be true or false, got {_short(value)}")
        return default if value is None else bool(value)


def _distinct(tokens: list[str]) -> list[str]:
    """A token that repeats an earlier one can be decoded but not found in a text: it gets a name of its own."""
    seen: set[str] = set()
    out = []
    for i, token in enumerate(tokens):
        name = token
        while name in seen:
            name = f"{token}[{i}]" if name == token else name + "'"
        seen.add(name)
        out.append(name)
    return out


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}" if value is not None else "nothing"
    return text if len(text) <= 80 else text[:77] + "..."
