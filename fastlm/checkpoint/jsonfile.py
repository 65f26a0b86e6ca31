"""JSON files of a model folder: config.json, generation_config.json, tokenizer_config.json, the index of shards."""

from __future__ import annotations

import json
import os
import re
import stat
from typing import Any

from fastlm.checkpoint.atomic import atomic_write
from fastlm.checkpoint.errors import FormatError

MAX_BYTES = 8 << 20  # the largest config in use is a tokenizer_config.json of 1.2 MB
MAX_DEPTH = 64
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises FormatError where the file is larger than `limit` bytes, is not UTF-8 or not JSON, nests deeper than 64, names a key
    twice, or holds something else than an object; OSError where it cannot be opened.
    """
    mode = os.stat(path).st_mode  # before open: opening a pipe would wait for its writer
    if not stat.S_ISREG(mode):
        raise FormatError(path, f"expected a JSON file, got {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}")
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise FormatError(path, f"expected a JSON file of at most {limit} bytes, got more")
    return parse_json(path, raw)


def parse_json(path: str | os.PathLike[str], raw: bytes, start: int = 0) -> dict[str, Any]:
    """The object in `raw`, which stands at byte `start` of the file: `read_json` without the file."""
    if depth(raw) > MAX_DEPTH:
        raise FormatError(path, f"JSON must nest at most {MAX_DEPTH} deep, got more")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates)
        if _SURROGATE.search(raw):  # a half of a pair would fail later, when it is printed or encoded
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, f"JSON must be UTF-8: {error.reason}", start + error.start) from None
    except UnicodeEncodeError:
        raise FormatError(path, "JSON holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        at = start + len(text[: error.pos].encode("utf-8"))
        raise FormatError(path, f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})", at) from None
    except (ValueError, RecursionError) as error:  # a key twice; a number of too many digits
        raise FormatError(path, f"not JSON that is read: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(path, f"expected a JSON object, got {_NAMES.get(type(value), type(value).__name__)}", start)
    return value


def write_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """An object as JSON, indented, keys in the order given; atomic."""
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def depth(raw: bytes) -> int:
    """How deep brackets nest outside strings, without recursion: what json.loads would meet before its first error."""
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    deepest = now = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        now += 1 if bracket in b"[{" else -1
        deepest = max(deepest, now)
    return deepest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return value


_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}
