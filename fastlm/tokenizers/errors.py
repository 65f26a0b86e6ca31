"""The one error of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class TokenizerError(ValueError):
    """A tokenizer file, GGUF metadata, chat template or text that cannot be used; the message says which and why."""


@contextlib.contextmanager
def typed(what: str) -> Iterator[None]:
    """Turns whatever the Rust libraries raise inside into a TokenizerError. They raise plain Exception, and PanicException where
    Rust panicked, which is no Exception at all."""
    try:
        yield
    except TokenizerError:
        raise
    except Exception as e:
        raise TokenizerError(f"{what}: {e}") from e
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {e}") from e


def check_unicode(what: str, text: str) -> None:
    """TokenizerError where a text holds half of a surrogate pair: bytes that were no UTF-8, read with errors="surrogateescape"."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"{what} text must be Unicode, got the lone surrogate {text[e.start]!r} at {e.start}: read its file with "
            'encoding="utf-8" and errors="replace"'
        ) from None
