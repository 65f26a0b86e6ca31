"""Decoding token by token: what each token adds to the text, with nothing shown that a later token would change."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.tokenizers.tokenizer import Tokenizer


def byte_alphabet() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in byte-level BPE (Radford et al. 2019), and their bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(rest)}}


_BYTES = byte_alphabet()


class DecodeStream:
    """`put(id)` gives the text that the id adds, `finish()` the rest; together they are `tokenizer.decode(ids)`.

    An unfinished UTF-8 character is held back, and so is a run of byte tokens (`<0xE2>`): the library decodes a run as a whole.
    With `prompt`, the pieces are what the ids add to the decoded prompt, so that the space before a word is kept.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = (), special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens
        self._kind = decoder_kind(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # the last id whose text was given
        self._held: list[int] = []  # byte tokens since
        for id in list(prompt)[-16:]:
            self.put(id)
        if self._held:
            self.finish()
        self._utf8.reset()

    def put(self, id: int) -> str:
        """The text that this id makes certain, often empty."""
        token = self._tokenizer.token(id)
        if token is None or (not self._special and id in self._tokenizer.special_ids):
            return ""
        if self._kind == "byte_level":
            return self._utf8.decode(token_bytes(token))
        self._held.append(id)
        if self._kind == "byte_fallback" and _is_byte(token):
            return ""
        return self._give()

    def finish(self) -> str:
        """The text still held back: an unfinished character becomes U+FFFD."""
        if self._kind == "byte_level":
            return self._utf8.decode(b"", final=True)
        return self._give()

    def _give(self) -> str:
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._context, special_tokens=self._special)
        after = self._tokenizer.decode(self._context + self._held, special_tokens=self._special)
        self._context, self._held = self._held[-1:], []
        return after[len(before) :]


def decoder_kind(tokenizer: Tokenizer) -> str:
    """byte_level, byte_fallback, or other: one token's text then depends on the token before it, at most."""
    decoder = tokenizer.backend.decoder
    described = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = [described.get("type"), *(d.get("type") for d in described.get("decoders", []))]
    if kinds[0] == "ByteLevel":
        return "byte_level"
    return "byte_fallback" if "ByteFallback" in kinds else "other"


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token outside that alphabet stands for itself."""
    try:
        return bytes([_BYTES[c] for c in token])
    except KeyError:
        return token.encode()


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
