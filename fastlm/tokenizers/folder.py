"""Reading a tokenizer from a Hugging Face folder."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastlm.tokenizers import build
from fastlm.tokenizers.errors import TokenizerError, check_unicode, typed
from fastlm.tokenizers.sentencepiece import backend_from_sentencepiece

ROLES = ("bos", "eos", "unk", "pad", "mask", "cls", "sep")
FURTHER = (
    "extra_special_tokens",
    "model_specific_special_tokens",
)  # what holds further roles: token by key, or a list without roles
_LARGEST = 256 << 20  # bytes of one file


def read_text(path: Path) -> str:
    """A UTF-8 file of reasonable size."""
    try:
        if path.stat().st_size > _LARGEST:
            raise TokenizerError(f"[from_folder] {path} has {path.stat().st_size} bytes, more than {_LARGEST}")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TokenizerError(f"[from_folder] {path} cannot be read: {e}") from e


def read_json(path: Path) -> Any:
    """A JSON file, {} where there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        if isinstance(e, TokenizerError):
            raise
        raise TokenizerError(f"[from_folder] {path} is not valid JSON: {e}") from e


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"[from_folder] {path} must hold a JSON object, got {type(value).__name__}")
    return value


def write(folder: Path, files: Mapping[str, str | None]) -> None:
    """Writes files, each into a temporary one that is renamed over it; removes those that are None. All are encoded before the first
    is written."""
    encoded = {}
    for name, text in files.items():
        check_unicode(f"[save] {name}:", text or "")
        encoded[name] = None if text is None else text.encode("utf-8")
    if folder.exists() and not folder.is_dir():
        raise TokenizerError(f"[save] {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in encoded.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
            continue
        temporary = folder / f".{name}.{secrets.token_hex(6)}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def has_tokenizer(folder: Path) -> bool:
    """Whether `from_folder` would find a vocabulary here."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt")
    return any((folder / name).exists() for name in names) or _bpe_files(folder) is not None


def backend_from_folder(folder: Path) -> tuple[Backend, dict[str, str], list[int], str | None, dict[str, Any]]:
    """The `tokenizers` object, special tokens by role, ids that end a text, the chat template and tokenizer_config.json."""
    config = read_object(folder / "tokenizer_config.json")
    special_map = read_object(folder / "special_tokens_map.json")
    special: dict[str, str] = {}
    for role in ROLES:
        for source in (config, special_map):
            value = source.get(f"{role}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                special.setdefault(role, value)
    bpe = _bpe_files(folder)
    if (folder / "tokenizer.json").exists():
        text = read_text(folder / "tokenizer.json")
        with typed(f"[from_folder] {folder / 'tokenizer.json'}"):
            backend = Backend.from_str(text)
            backend.no_padding()
            backend.no_truncation()
    elif bpe is not None:
        backend = _from_bpe(folder, bpe, config, special)
    elif (folder / "tokenizer.model").exists():
        backend = _from_sentencepiece(folder, config, special)
    elif (folder / "vocab.txt").exists():
        backend = _from_vocab_txt(folder, config, special)
    else:
        raise TokenizerError(
            f"[from_folder] no tokenizer in {folder}: expected tokenizer.json, vocab.json + merges.txt, tokenizer.model or vocab.txt"
        )
    _add_from_config(backend, config)
    special |= {k: v for k, v in _further_roles(config, special_map).items() if k not in special}
    special = {role: token for role, token in special.items() if _known(backend, token)}
    wanted = {side: config.get(f"add_{side}_token") for side in ("bos", "eos")}
    if str(config.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama", "Gemma")) and any(
        v is not None for v in wanted.values()
    ):
        build.surround(backend, *(special.get(side) if wanted[side] else None for side in ("bos", "eos")))
    return backend, special, _ends(folder, backend, special), _template(folder, config), config


def named(role: Any) -> bool:
    """Whether a role can be one of a token: its key, `eot_token`, must be no setting, as `add_bos_token` is."""
    return isinstance(role, str) and role.isidentifier() and not role.startswith("add_")


def _further_roles(*sources: dict[str, Any]) -> dict[str, str]:
    """The tokens of roles beyond ROLES, {"eot": "<|eot|>"}, by the keys that Hugging Face has for them: `eot_token`, beside the others
    or in an object of further ones."""
    found: dict[str, str] = {}
    for source in sources:
        further = [source.get(key) for key in FURTHER]
        for entries in (source, *(entries for entries in further if isinstance(entries, dict))):
            for key, value in entries.items():
                value = value.get("content") if isinstance(value, dict) else value
                role = key.removesuffix("_token")
                if role != key and role not in ROLES and named(role) and isinstance(value, str) and value:
                    found.setdefault(role, value)
    return found


def _bpe_files(folder: Path) -> tuple[Path, Path] | None:
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() and (folder / merges).exists():
            return folder / vocab, folder / merges
    return None


def _from_bpe(folder: Path, files: tuple[Path, Path], config: dict[str, Any], special: dict[str, str]) -> Backend:
    vocab = read_object(files[0])
    if not all(isinstance(i, int) and 0 <= i < 2**32 for i in vocab.values()):
        raise TokenizerError(f"[from_folder] {files[0]} must map tokens to ids")
    merges = []
    for line in read_text(files[1]).split("\n"):
        parts = line.rstrip("\r").split(" ")
        if line.startswith("#version") or parts == [""]:
            continue
        if len(parts) != 2:
            raise TokenizerError(f"[from_folder] {files[1]}: a merge must be two tokens and a space between, got {line!r}")
        merges.append((parts[0], parts[1]))
    backend = build.byte_level(vocab, merges, add_prefix_space=bool(config.get("add_prefix_space", False)))
    if not special and "<|endoftext|>" in vocab:
        special.update(dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"))
    build.add_tokens(backend, [t for t in dict.fromkeys(special.values()) if t in vocab])
    return backend


def _from_sentencepiece(folder: Path, config: dict[str, Any], special: dict[str, str]) -> Backend:
    try:
        data = (folder / "tokenizer.model").read_bytes()
    except OSError as e:
        raise TokenizerError(f"[from_folder] {folder / 'tokenizer.model'} cannot be read: {e}") from e
    backend, found = backend_from_sentencepiece(data, str(folder / "tokenizer.model"))
    for role, token in found.items():
        special.setdefault(role, token)
    # The file does not say what surrounds a text: the classes of the reference do, LLaMA's bos and T5's eos.
    t5 = str(config.get("tokenizer_class", "")).startswith("T5")
    bos, eos = config.get("add_bos_token", not t5), config.get("add_eos_token", t5)
    build.surround(backend, special.get("bos") if bos else None, special.get("eos") if eos else None)
    return backend


def _from_vocab_txt(folder: Path, config: dict[str, Any], special: dict[str, str]) -> Backend:
    lines = read_text(folder / "vocab.txt").split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    vocab: dict[str, int] = {}
    for i, line in enumerate(lines):
        vocab[line.rstrip("\r")] = i
    for role, token in (("unk", "[UNK]"), ("pad", "[PAD]"), ("cls", "[CLS]"), ("sep", "[SEP]"), ("mask", "[MASK]")):
        if token in vocab:
            special.setdefault(role, token)
    if special.get("unk") not in vocab:
        raise TokenizerError(f"[from_folder] {folder / 'vocab.txt'} must hold [UNK]")
    accents = config.get("strip_accents")
    backend = build.word_piece(
        vocab,
        special["unk"],
        lowercase=bool(config.get("do_lower_case", True)),
        chinese=bool(config.get("tokenize_chinese_chars", True)),
        accents=accents if isinstance(accents, bool) else None,
    )
    build.add_tokens(backend, [t for t in dict.fromkeys(special.values()) if t in vocab])
    return backend


def _add_from_config(backend: Backend, config: dict[str, Any]) -> None:
    """Tokens that only tokenizer_config.json names, at the ids it gives."""
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise TokenizerError(f"[from_folder] added_tokens_decoder must be an object, got {type(entries).__name__}")
    for key, entry in sorted(entries.items(), key=lambda e: int(e[0]) if str(e[0]).isdigit() else 0):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not str(key).isdigit():
            raise TokenizerError(f"[from_folder] added_tokens_decoder[{key!r}] must be an object with content, got {entry!r}")
        if _known(backend, entry["content"]):
            continue
        with typed("[from_folder] added_tokens_decoder"):
            flags = {k: bool(entry.get(k, False)) for k in ("lstrip", "rstrip", "single_word", "special")}
            token = AddedToken(entry["content"], normalized=bool(entry.get("normalized", True)), **flags)
            (backend.add_special_tokens if flags["special"] else backend.add_tokens)([token])
        got = backend.token_to_id(entry["content"])
        if got != int(key):
            raise TokenizerError(
                f"[from_folder] added_tokens_decoder puts {entry['content']!r} at {key}, the vocabulary ends before {got}"
            )


def _known(backend: Backend, token: str) -> bool:
    with typed("[from_folder] special tokens"):
        return backend.token_to_id(token) is not None


def _ends(folder: Path, backend: Backend, special: dict[str, str]) -> list[int]:
    """The ids of generation_config.json that end a text (chat models have several), else eos."""
    given = read_object(folder / "generation_config.json").get("eos_token_id")
    ids = [i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    eos = backend.token_to_id(special["eos"]) if "eos" in special else None
    if eos is not None:
        ids.append(eos)
    return list(dict.fromkeys(ids))


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over the one in tokenizer_config.json, which is a string or a list of named ones."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
