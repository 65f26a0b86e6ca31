"""From a folder, a GGUF file or a Hugging Face id to a model and its tokenizer, and back to a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastlm.checkpoint import (
    FormatError,
    read_gguf,
    read_json,
    read_safetensors,
    sync_folder,
    write_json,
    write_safetensors,
)
from fastlm.models import ARCHITECTURES, module_of
from fastlm.models.base import CausalLM, LanguageModel, check_config
from fastlm.models.convert import (
    config_from_hf,
    config_to_hf,
    guess_architecture,
    load_hf,
    parameter_dtype,
    tensors_to_hf,
)
from fastlm.models.encoder import Encoder, Pooling
from fastlm.models.gguf import config_from_gguf, load_gguf
from fastlm.tokenizers import Tokenizer

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PATTERNS = [
    "*.json",
    "1_Pooling/config.json",
    "vocab.txt",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
]  # never code, never pickles


def load_folder_or_gguf(path_or_id: str | os.PathLike[str], dtype: str | None = None) -> tuple[LanguageModel, Tokenizer | None]:
    """The model and tokenizer of a Hugging Face folder, a GGUF file, or a Hugging Face id ("org/name").

    dtype None keeps bfloat16 and quantised matrices as they are and makes float16 float32; "float32" or "bfloat16" converts all.
    The tokenizer is None where there is none. Raises FormatError (a ValueError) for a file that is corrupt or does not fit its own
    configuration, FileNotFoundError where nothing is found.
    """
    path = _path("load", path_or_id)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise FormatError(
                path, "expected a folder with config.json and *.safetensors, or a .gguf file; other files are not loaded"
            )
        return _load_gguf(path, dtype)
    if isinstance(path_or_id, str) and _ID.fullmatch(path_or_id) and path.suffix.lower() != ".gguf":
        return _load_folder(download(path_or_id), dtype)
    raise FileNotFoundError(f"[load] no such folder or file: {path}")


def _path(op: str, given: Any) -> Path:
    if not isinstance(given, (str, os.PathLike)):
        what = "a folder, a .gguf file or a Hugging Face id" if op == "load" else "the path of a folder"
        raise TypeError(f"[{op}] {what} must be given, got {given!r:.60}.")
    return Path(given)


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face hub: from the local cache, else fetched into it. Only JSON and safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=True))
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"[load] {name!r} is no local folder or file, and the Hugging Face hub did not give it: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. Check the name and the network, or give a folder."
        ) from None


def _load_folder(folder: Path, dtype: str | None) -> tuple[LanguageModel, Tokenizer | None]:
    config_path = folder / "config.json"
    if not config_path.exists():
        found = sorted(folder.glob("*.gguf"))
        if len(found) == 1:
            return _load_gguf(found[0], dtype)
        said = f"[load] {folder} has no config.json"
        if found:
            raise FileNotFoundError(f"{said}, and {len(found)} .gguf files: name one")
        if (folder / "model" / "config.json").exists():  # where `fastlm train --out` was told to write
            raise FileNotFoundError(f"{said}, its folder 'model' has: give {folder / 'model'}")
        if others := [p for p in sorted(folder.glob("*.bin")) if not p.name.startswith(("pytorch_model", "tok"))]:
            raise FileNotFoundError(f"{said}: a model of llama2.c is made a folder by `fastlm convert {others[0]} OUT`")
        raise FileNotFoundError(f"{said}: expected a folder with config.json and *.safetensors, or a .gguf file")
    raw = read_json(config_path)
    tensors = dict(read_safetensors(folder))
    kind = raw["model_type"] if "model_type" in raw else _guess_type(raw, tensors)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise FormatError(config_path, f"model_type must be one of {', '.join(ARCHITECTURES)}, got {kind!r:.60}")
    module = ARCHITECTURES[kind]
    try:
        if not raw.get("architectures") and (guessed := guess_architecture(module, tensors)):
            raw = raw | {"architectures": [guessed]}
        if hasattr(module, "hf_found"):
            raw = module.hf_found(raw, tensors)
        model = _declare(module, config_from_hf(module, raw), tensors)
        load_hf(module, model, tensors, dtype)
    except _HOSTILE as error:
        raise FormatError(config_path, _said(error)) from None
    if isinstance(model, Encoder):
        model.pooling = _read_pooling(folder)
    tokenizer = _folder_tokenizer(folder)
    model.token_ids = {k: raw[k] for k in _TOKEN_IDS if k in raw}
    if (folder / "generation_config.json").exists():
        model.generation = read_json(folder / "generation_config.json")
    return model, tokenizer


def _guess_type(raw: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    """The model_type of older files that leave it out: by the class that they name, else by the prefix of their tensors."""
    asked = raw.get("architectures")
    if isinstance(asked, list) and asked:
        for kind, module in ARCHITECTURES.items():
            if asked[0] in ((module.HF_CLASS,) if isinstance(module.HF_CLASS, str) else module.HF_CLASS.values()):
                return kind
    prefixes = {kind: module.HF_PREFIX for kind, module in ARCHITECTURES.items() if module.HF_PREFIX}
    found = [kind for kind, prefix in prefixes.items() if any(name.startswith(prefix) for name in tensors)]
    return found[0] if len(found) == 1 else None


# How sentence-transformers pools


def _read_pooling(folder: Path) -> Pooling:
    """What modules.json and the folders that it names say; the mean where there is none."""
    if not (folder / "modules.json").exists():
        return Pooling()
    path = folder / "1_Pooling" / "config.json"
    modules: Any
    try:
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(folder / "modules.json", f"not JSON that is read: {error}") from None
    if not isinstance(modules, list):
        raise FormatError(folder / "modules.json", f"expected a list of modules, got {type(modules).__name__}")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or not path.exists():
        raise FormatError(folder / "modules.json", f"expected Transformer, Pooling and perhaps Normalize, got {', '.join(kinds)}")
    modes = [
        key.removeprefix("pooling_mode_") for key, on in read_json(path).items() if key.startswith("pooling_mode_") and on is True
    ]
    if modes not in (["mean_tokens"], ["cls_token"]):
        raise FormatError(path, f"the pooling mode must be mean_tokens or cls_token, got {', '.join(modes)}")
    sizes = folder / "sentence_bert_config.json"
    longest = read_json(sizes).get("max_seq_length") if sizes.exists() else None
    if longest is not None and (type(longest) is not int or longest < 2):
        raise FormatError(sizes, f"max_seq_length must be an integer of at least 2, got {longest!r:.60}")
    return Pooling(modes[0].partition("_")[0], "Normalize" in kinds, longest)


def _write_pooling(pooling: Pooling, width: int, folder: Path) -> None:
    if pooling == Pooling():
        return
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * pooling.normalise
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling.mode) for mode in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width} | modes)
    if pooling.max_tokens is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": pooling.max_tokens, "do_lower_case": False})


_REPEATED = {  # parts of a model
    "n_layer": "layers",
    "n_encoder_layer": "encoder layers",
    "n_group": "groups",
    "n_inner": "inner blocks",
    "n_expert": "experts",
}


def _declare(module: ModuleType, config: Any, tensors: Mapping[str, Any]) -> LanguageModel:
    """The declared model, unless the config asks for more parts, or wider ones, than the file has: a hostile one would take all memory."""
    check_config(config)
    count = len(tensors)
    for name, what in _REPEATED.items():
        given = getattr(config, name, 0)
        stacked = max((len(t) for t in tensors.values() if t.ndim == 3), default=0) if name == "n_expert" else 0
        if given > max(count, stacked):
            raise ValueError(f"the configuration has {given} {what}, the file only {count} tensors")
    if config.d_model > (largest := max((t.size for t in tensors.values()), default=0)):
        raise ValueError(f"the configuration has a d_model of {config.d_model}, the largest tensor only {largest} numbers")
    model: LanguageModel = module.Model(config)
    return model


# What values of another kind or size than a reader expects may raise on the way.
_HOSTILE = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


def _said(error: Exception) -> str:
    """What an error of `_HOSTILE` says, by its name where it is not one of ours."""
    return str(error) if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {error}"


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")):
        return None
    return Tokenizer.from_folder(folder)


# GGUF


def _load_gguf(path: Path, dtype: str | None) -> tuple[LanguageModel, Tokenizer | None]:
    metadata, tensors = read_gguf(path)
    arch = metadata.get("general.architecture")
    known = [name for name, module in ARCHITECTURES.items() if hasattr(module, "GGUF_NAMES")]
    if not isinstance(arch, str) or arch not in known:
        raise FormatError(path, f"general.architecture must be one of {', '.join(known)}, got {arch!r:.60}")
    experts = arch == "llama" and metadata.get("llama.expert_count", 0)
    module = ARCHITECTURES["mixtral" if np.any(experts) else arch]
    try:
        config = config_from_gguf(module, arch, metadata, tensors)
        model = _declare(module, config, tensors)
        load_gguf(module, model, tensors, dtype)
    except _HOSTILE as error:
        raise FormatError(path, _said(error)) from None
    return model, Tokenizer.from_gguf(metadata) if "tokenizer.ggml.tokens" in metadata else None


# Saving


def save(model: LanguageModel, tokenizer: Tokenizer | None, folder: str | os.PathLike[str]) -> None:
    """Writes a Hugging Face folder, which transformers loads: config.json, model.safetensors and the tokenizer's files.

    Atomic: the folder is written beside its place and renamed, so a reader sees the old one or the new one. A folder that is there
    already is replaced if it holds a model or nothing, else ValueError. Weights keep their dtype (quantised ones become float32).
    """
    target = _path("save", folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"[save] {target} is a file: give a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
        raise ValueError(f"[save] {target} holds something other than a model: give another folder, or empty this one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_files(model, tokenizer, staging)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_files(model: LanguageModel, tokenizer: Tokenizer | None, folder: Path) -> None:
    """What `save` writes, into a folder that is there."""
    module = module_of(model)
    own = config_to_hf(module, model.config)
    raw = dict(model.token_ids) | own | {"torch_dtype": parameter_dtype(model.named_parameters())}
    generation = dict(model.generation)
    if tokenizer is not None:
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        for key, value in ends.items():
            # RoBERTa counts its positions from the pad of its own: another tokenizer's would move them all.
            if value is not None and own.get(key) is None and value not in _listed(raw.get(key)):
                raw[key] = value
        if isinstance(model, CausalLM):  # the reference would take its class's: LLaMA's eos is 2, here any character
            raw = {"bos_token_id": None, "eos_token_id": None} | raw
        tokenizer.save(folder)
        if tokenizer.end_ids:
            # Where this file is, the reference reads none of these from config.json: T5 would not know where to start.
            names = (*_TOKEN_IDS, "decoder_start_token_id")
            generation = {k: raw[k] for k in names if raw.get(k) is not None} | generation
            generation |= {k: v for k, v in ends.items() if v is not None} | {"eos_token_id": list(tokenizer.end_ids)}
    if generation:
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", raw)
    write_safetensors(folder, tensors_to_hf(module, model))
    if isinstance(model, Encoder):
        _write_pooling(model.pooling, model.config.d_model, folder)


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def replace_folder(staging: Path, target: Path) -> None:
    """Renames a finished folder into place after everything in it has reached the disk."""
    staging.chmod(0o755)  # mkdtemp makes it private
    for path in (p for p in staging.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(staging)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old / "replaced")
        os.replace(staging, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(staging, target)
    sync_folder(target.parent)
