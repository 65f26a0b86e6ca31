"""Tokenizer: text to ids, ids to text, chats to text."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastlm.tokenizers import chat as chat_templates
from fastlm.tokenizers import folder as folders
from fastlm.tokenizers.errors import TokenizerError, check_unicode, typed
from fastlm.tokenizers.gguf import backend_from_gguf
from fastlm.tokenizers.llama2c import BOS, EOS, UNK, backend_from_llama2c
from fastlm.tokenizers.stream import DecodeStream
from fastlm.tokenizers.train import END, character_backend, trained_bpe


class Tokenizer:
    """A `tokenizers` object with its special tokens and chat template. Make one by `from_folder`, `from_gguf`, `train_bpe`, ..."""

    def __init__(
        self,
        backend: Backend,
        special: Mapping[str, str] | None = None,
        ends: Iterable[int] = (),
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`special` maps a role (bos, eos, unk, pad, mask, cls, sep, or one of yours) to its token; `ends` are the ids that end a text
        (eos if not given)."""
        self.backend = backend
        self.special = dict(special or {})
        self.chat_template = chat_template
        self._config = dict(config or {})
        for role, token in self.special.items():
            if not folders.named(role):
                raise TokenizerError(f"[tokenizer] a role must be a word that does not begin with add_, got {role!r}")
            if backend.token_to_id(token) is None:
                raise TokenizerError(f"[tokenizer] the {role} token {token!r} is not in the vocabulary")
        self.bos_id = self._role("bos")
        self.eos_id = self._role("eos")
        self.pad_id = self._role("pad")
        self.unk_id = self._role("unk")
        self.end_ids = tuple(dict.fromkeys(ends)) or (() if self.eos_id is None else (self.eos_id,))
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    # How a tokenizer is made

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From tokenizer.json, vocab.json + merges.txt, tokenizer.model or vocab.txt, with tokenizer_config.json, special_tokens_map.json,
        generation_config.json and chat_template.jinja where present. Raises TokenizerError."""
        return cls(*folders.backend_from_folder(Path(folder)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the metadata of a GGUF file: `tokenizer.ggml.*` and `tokenizer.chat_template`. Raises TokenizerError."""
        template = metadata.get("tokenizer.chat_template")
        return cls(*backend_from_gguf(metadata), template if isinstance(template, str) else None)

    @classmethod
    def from_llama2c(cls, path: str | Path) -> Tokenizer:
        """From llama2.c's tokenizer.bin (tok512.bin and the like); texts begin with bos. A text ends at bos or eos, as there."""
        return cls(backend_from_llama2c(Path(path)), {"bos": BOS, "eos": EOS, "unk": UNK}, (2, 1))

    @classmethod
    def train_bpe(cls, texts: Iterable[str | Path], vocab_size: int) -> Tokenizer:
        """Byte-level BPE learnt from texts (str) or text files (Path). `<|endoftext|>` is bos and eos."""
        return cls(trained_bpe(texts, vocab_size), {"bos": END, "eos": END})

    @classmethod
    def characters(cls, text: str) -> Tokenizer:
        """One id for each character of the text, in code point order; nothing else can be encoded."""
        return cls(character_backend(text))

    def with_special(self, roles: Mapping[str, str], more: Sequence[str] = ()) -> Tokenizer:
        """The same vocabulary with special tokens behind it, in the order given: `roles` maps pad, mask, cls, sep ... to a token, and
        any other role, "eot", which templates and transformers know as eot_token; `more` have no role. What is there already keeps its
        id."""
        if not isinstance(roles, Mapping):
            raise TypeError(f'[with_special] roles must be a dict such as {{"pad": "[PAD]"}}, got {roles!r:.60}')
        backend = Backend.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*roles.values(), *more)])
        ends = self.end_ids
        if (eos := backend.token_to_id(roles["eos"]) if "eos" in roles else None) is not None:  # in the place of the eos that was
            ends = (*(eos if i == self.eos_id else i for i in ends), eos)
        return Tokenizer(backend, {**self.special, **roles}, ends, self.chat_template, self._config)

    # Text and ids

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to here; a model may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The ids of a text. With `special_tokens`, what the model expects around it (bos, [CLS]) is added; give False for a text
        that already holds it, as `chat` returns."""
        return self.encode_batch([text], special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, for many texts at once, in parallel."""
        if isinstance(texts, str):
            raise TypeError("[encode] texts must be a list of strs, got one str: encode takes that")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"[encode] text must be a str, got {type(text).__name__}")
            self._check_characters(text)
            check_unicode("[encode]", text)
        with typed("[encode]"):
            return [list(e.ids) for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)]

    def decode(self, ids: Iterable[int], special_tokens: bool = False) -> str:
        """The text of ids; special tokens are left out unless asked for, and so are ids that have no token."""
        try:
            numbers = [operator.index(i) for i in ids]
        except TypeError:
            raise TypeError(f"[decode] ids must be a list of integers, got {ids!r:.80}") from None
        bad = next((i for i in numbers if not 0 <= i < 2**32), None)
        if bad is not None:
            raise TokenizerError(f"[decode] ids must be from 0 to {2**32 - 1}, got {bad}")
        with typed("[decode]"):
            return str(self.backend.decode(numbers, skip_special_tokens=not special_tokens))

    def decode_stream(self, prompt: Iterable[int] = (), special_tokens: bool = False) -> DecodeStream:
        """A decoder for one id at a time; see DecodeStream."""
        return DecodeStream(self, prompt, special_tokens)

    def token(self, id: int) -> str | None:
        """The token of an id as the vocabulary writes it, None if there is none."""
        try:
            number = operator.index(id)
        except TypeError:
            raise TypeError(f"[decode] id must be an integer, got {id!r:.80}") from None
        return self.backend.id_to_token(number) if 0 <= number < 2**32 else None

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, None if there is none."""
        return self.backend.token_to_id(token)

    # Chat

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a chat: `[{"role": "user", "content": "..."}]`, by the model's template. Encode it with special_tokens=False.

        Raises TokenizerError where there is no template, or it fails, refuses the messages, or does not end.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "[chat] this tokenizer has no chat template; set tokenizer.chat_template, or use generate on plain text"
            )
        tokens = {f"{role}_token": token for role, token in self.special.items()}
        return chat_templates.render(
            self.chat_template, messages, {"add_generation_prompt": add_generation_prompt, "tools": None, **tokens, **variables}
        )

    # Files

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, which the transformers library reads too; and
        generation_config.json where more than eos ends a text. Each file appears whole or not at all. What another tokenizer has left
        in the folder and would be read with this one goes: its chat template, special tokens and ends of a text."""
        target = Path(folder)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._config,
        }
        if not str(config["tokenizer_class"]).endswith("Fast"):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the slow classes want their own files
        config.pop("chat_template", None)
        roles = {f"{role}_token": token for role, token in self.special.items()}
        config.update(roles)
        for key in folders.FURTHER:  # a role that was given another token since
            if isinstance(held := config.get(key), dict):
                config[key] = {k: roles.get(k, token) for k, token in held.items()}
        with typed("[save] tokenizer.json"):
            vocabulary = self.backend.to_str(pretty=True)
        files: dict[str, str | None] = {
            "tokenizer.json": vocabulary,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "generation_config.json": self._generation(target / "generation_config.json"),
            "chat_template.jinja": self.chat_template,
            "special_tokens_map.json": None,
            "added_tokens.json": None,
        }
        folders.write(target, files)

    def _generation(self, path: Path) -> str | None:
        """generation_config.json, where one is there or more than eos ends a text: what it holds, with the ids that this tokenizer has."""
        given = folders.read_object(path)
        alone = self.end_ids == (() if self.eos_id is None else (self.eos_id,))
        if alone and not given:
            return None
        given.pop("eos_token_id", None)
        ends = {
            "eos_token_id": self.eos_id if alone else list(self.end_ids),
            "bos_token_id": self.bos_id,
            "pad_token_id": self.pad_id,
        }
        given |= {k: v for k, v in ends.items() if v is not None}
        return json.dumps(given, indent=2) + "\n" if given else None

    def __repr__(self) -> str:
        roles = ", ".join(f"{role}={token!r}" for role, token in self.special.items())
        return f"Tokenizer({type(self.backend.model).__name__}, vocab_size={self.vocab_size}{', ' + roles if roles else ''})"

    def _role(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def _characters(self) -> frozenset[str] | None:
        """The characters of a character vocabulary; None for any other. The library would drop unknown ones in silence."""
        described = json.loads(self.backend.model.__getstate__())
        if (
            described.get("type") != "BPE"
            or described.get("merges")
            or described.get("unk_token")
            or self.backend.pre_tokenizer is not None
        ):
            return None
        return frozenset(self.backend.get_vocab(with_added_tokens=True)) if not described.get("byte_fallback") else None

    def _check_characters(self, text: str) -> None:
        if self._characters is None:
            return
        missing = sorted(set(text) - self._characters)
        added = sorted((t.content for t in self.backend.get_added_tokens_decoder().values()), key=len, reverse=True)
        if missing and added:  # characters of an added token, which is found before anything else
            missing = sorted(set(re.sub("|".join(map(re.escape, added)), "", text)) - self._characters)
        if missing:
            raise TokenizerError(f"[encode] characters that are not in the vocabulary: {', '.join(map(repr, missing[:8]))}")
