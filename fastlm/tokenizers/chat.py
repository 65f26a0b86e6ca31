"""Chat templates: Jinja as Hugging Face renders it, by minijinja, with a bound on the work a template may do."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fastlm.tokenizers.errors import TokenizerError, check_unicode, typed

FUEL = 5_000_000  # instructions; a chat of 1000 messages takes some 50,000
_LONGEST = 1 << 20  # characters of a template

# {% generation %} marks what the model wrote, for training masks; it renders as its contents.
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class _Refused(Exception):
    """What a template raises by raise_exception."""


def _raise(message: Any) -> None:
    raise _Refused(str(message))


def _tojson(
    value: Any, indent: int | None = None, ensure_ascii: bool = False, separators: Any = None, sort_keys: bool = False
) -> str:
    """As Hugging Face defines it: plain JSON, nothing escaped for HTML."""
    pair = tuple(separators) if separators is not None else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _environment(template: str) -> Any:
    import minijinja

    environment = minijinja.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        fuel=FUEL,
        auto_escape_callback=lambda _: False,
        filters={"tojson": _tojson},
        globals={"raise_exception": _raise, "strftime_now": lambda form: datetime.datetime.now().strftime(form)},
    )
    environment.add_template(
        "chat",
        _GENERATION.sub(lambda m: f"{{%{m[1]} if true {m[2]}%}}" if "end" not in m[0] else f"{{%{m[1]} endif {m[2]}%}}", template),
    )
    return environment


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a chat. Raises TokenizerError for a template that is wrong, too long, does not end, or refuses the messages."""
    if len(template) > _LONGEST:
        raise TokenizerError(f"[chat] the template may have {_LONGEST} characters at most, got {len(template)}")
    plain = [dict(m) for m in messages]
    for i, message in enumerate(plain):
        if not isinstance(message.get("role"), str):
            raise TokenizerError(f"[chat] message {i} must be a mapping with role and content, got {message!r}")
        for value in message.values():  # the library would put three other characters there
            if isinstance(value, str):
                check_unicode("[chat]", value)
    with typed("[chat] the chat template"):
        try:
            text: str = _environment(template).render_template("chat", messages=plain, **variables)
        except _Refused as e:
            raise TokenizerError(f"[chat] the chat template refuses these messages: {e}") from e
    return text
