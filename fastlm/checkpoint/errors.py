"""What a reader raises for a file that is not what it claims to be."""

from __future__ import annotations

import os
from typing import Any


class FormatError(ValueError):
    """A corrupt, truncated or hostile file, or one of a kind that is not read.

    The message names the file, the byte, what was expected and what came. `path` and `offset` carry them for programs; `offset` is
    None where no byte can be named.
    """

    def __init__(self, path: str | os.PathLike[str], message: str, offset: int | None = None) -> None:
        self.path = os.fspath(path)
        self.offset = offset
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{self.path}{at}: {message}")


def short(value: Any, limit: int = 80) -> str:
    """repr of something out of a file, for a message: a file must not decide how long that gets."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
