"""Between a model and the files of others: configurations and names, by the tables in the model's own file. Strict both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from fastlm import backend
from fastlm.backend import Array
from fastlm.checkpoint import QuantizedArray
from fastlm.checkpoint.quantized import LOSSLESS
from fastlm.models.base import LanguageModel, names
from fastlm.nn import Declared
from fastlm.tensor import Tensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Keys of config.json that say nothing about the forward pass.
# fmt: off
IGNORED = frozenset((
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "output_past",
    "gradient_checkpointing", "unsloth_version", "transformers.js_config", "return_dict", "output_hidden_states",
    "output_attentions", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder",
    "finetuning_task",
    "prefix", "do_sample", "max_length", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty",
))
# fmt: on


def config_from_hf(module: ModuleType, raw: Mapping[str, Any]) -> Any:
    """A config.json as the model's Config. ValueError names every key that is unknown or has a value that is not supported."""
    if raw.get("auto_map"):
        raise ValueError("config.json asks for code of its own (auto_map): fastlm runs no code from checkpoints.")
    if raw.get("quantization_config"):
        raise ValueError("config.json has a quantization_config: load the unquantised model, or a GGUF file.")
    if hasattr(module, "hf_defaults"):
        raw = module.hf_defaults(raw)
    known = set(module.HF_CONFIG) | set(module.HF_FIXED) | set(module.HF_IGNORED) | IGNORED
    kinds = {field.name for field in dataclasses.fields(module.Config)}
    wrong = [f"unknown key {k!r} = {v!r:.60}" for k, v in raw.items() if k not in known and not k.startswith("_")]
    wrong += [f"{k!r} must be {v!r}, got {raw[k]!r:.60}" for k, v in module.HF_FIXED.items() if raw.get(k, v) != v]
    values: dict[str, Any] = {}
    for theirs, ours in module.HF_CONFIG.items():
        if theirs not in raw:
            continue
        value = raw[theirs]
        table = module.HF_VALUES.get(ours)
        if table is None:
            values[ours] = value
        elif isinstance(value, str) and value in table:
            values[ours] = table[value]
        else:
            wrong.append(f"{theirs!r} must be one of {', '.join(table)}, got {value!r:.60}")
    if "head" in kinds:
        head = _head(module, raw)
        if head is not None and head not in module.HF_CLASS:
            wrong.append(head)
        values["head"] = head
    if "labels" in kinds:
        labels = _labels(raw)
        values |= {} if labels is None else {"labels": labels}
    if wrong:
        raise ValueError(f"config.json of model_type {module.HF_TYPE!r}: " + "; ".join(wrong))
    return module.Config(**values)


def _head(module: ModuleType, raw: Mapping[str, Any]) -> str | None:
    """The head's name that `architectures` asks for, None for the bare model; what is wrong if it is none of them."""
    asked = raw.get("architectures") or [module.HF_CLASS[None]]
    found = [head for head, theirs in module.HF_CLASS.items() if isinstance(asked, list) and theirs == asked[0]]
    return found[0] if found else f"'architectures' must be one of {', '.join(module.HF_CLASS.values())}, got {asked!r:.60}"


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the labels by number: of id2label, else num_labels without names; None where neither is there."""
    count, table = raw.get("num_labels"), raw.get("id2label")
    if not table:
        if count is None:
            return None
        if type(count) is not int or not 0 < count < 1 << 20:
            raise ValueError(f"config.json: 'num_labels' must be a positive integer, got {count!r:.60}")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(table, dict) or {str(k) for k in table} != {str(i) for i in range(len(table))}:
        raise ValueError(f"config.json: 'id2label' must map 0, 1, ... to labels, got {table!r:.60}")
    return tuple(str(table.get(str(i), table.get(i))) for i in range(len(table)))


def config_to_hf(module: ModuleType, config: Any) -> dict[str, Any]:
    """The model's Config as a config.json that transformers reads."""
    theirs_class = module.HF_CLASS if isinstance(module.HF_CLASS, str) else module.HF_CLASS[config.head]
    raw: dict[str, Any] = {"architectures": [theirs_class], "model_type": module.HF_TYPE}
    for theirs, ours in module.HF_CONFIG.items():
        value = getattr(config, ours)
        if ours in module.HF_VALUES:
            value = next(k for k, v in module.HF_VALUES[ours].items() if v == value)
        raw[theirs] = dict(value) if isinstance(value, Mapping) else value
    if raw.get("bias") is True:
        del raw["bias"]
    scaling = raw.get("rope_scaling")
    if scaling and scaling.get("rope_type") == "factors":
        raise ValueError("[save] the RoPE factors of this GGUF file have no form in config.json; set config.rope_scaling first.")
    if hasattr(config, "labels"):
        raw["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        raw["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return raw | {k: v for k, v in module.HF_FIXED.items() if v not in (False, None)}


def table_of(module: ModuleType, config: Any) -> dict[str, str]:
    """HF_NAMES, with the names of the head that the config asks for."""
    heads = getattr(module, "HF_HEADS", {})
    return {**module.HF_NAMES, **heads.get(getattr(config, "head", None), {})}


def load_hf(module: ModuleType, model: LanguageModel, tensors: Mapping[str, Any], dtype: str | None = None) -> None:
    """Puts the tensors of a Hugging Face folder into a declared model: renamed, read and tied as the model's file says."""
    table = table_of(module, model.config)
    tensors = _renamed(module, tensors)
    if hasattr(module, "hf_read"):
        tensors = module.hf_read(tensors, model.config)
    load_tensors(model, tensors, table, module.HF_TRANSPOSED, module.HF_IGNORED_TENSORS, dtype, tied=getattr(module, "HF_TIED", {}))


def _renamed(module: ModuleType, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Under today's names: older ones replaced, and a tied tensor that is there by its second name alone."""
    found = dict(tensors)
    for pattern, name in getattr(module, "HF_RENAMED", ()):
        found = {re.sub(pattern, name, k): v for k, v in found.items()}
    _add_prefix(module, found)
    for name, original in getattr(module, "HF_TIED", {}).items():
        if name in found and original not in found:
            found[original] = found.pop(name)
    return found


def guess_architecture(module: ModuleType, tensors: Mapping[str, Any]) -> str | None:
    """The class in a config.json that leaves out `architectures`: by the one head whose every part is there."""
    if isinstance(module.HF_CLASS, str):
        return None
    parts = {name for tensor in _renamed(module, tensors) for name in (tensor, tensor.rpartition(".")[0])}
    fits = [head for head, table in module.HF_HEADS.items() if parts.issuperset(table.values())]
    most = max((len(module.HF_HEADS[head]) for head in fits), default=0)
    best = [head for head in fits if len(module.HF_HEADS[head]) == most]
    if len(best) > 1:
        raise ValueError(f"config.json must have 'architectures': the weights fit {', '.join(module.HF_CLASS[h] for h in best)}")
    guessed: str = module.HF_CLASS[best[0] if best else None]
    return guessed


def _add_prefix(module: ModuleType, tensors: dict[str, Any]) -> None:
    """Files of the bare model leave out the prefix: `h.0...` for `transformer.h.0...`."""
    if any(name.startswith(module.HF_PREFIX) for name in tensors):
        return
    tables = [module.HF_NAMES, *getattr(module, "HF_HEADS", {}).values()]
    heads = {theirs + "." for table in tables for theirs in table.values() if not theirs.startswith(module.HF_PREFIX)}
    for name in list(tensors):
        if not any(f"{name}.".startswith(head) for head in heads):
            tensors[module.HF_PREFIX + name] = tensors.pop(name)


def load_tensors(
    model: LanguageModel,
    tensors: Mapping[str, Any],
    table: Mapping[str, str],
    transposed: Iterable[str] = (),
    ignored: Iterable[str] = (),
    dtype: str | None = None,
    *,
    tied: Mapping[str, str] = {},
) -> None:
    """Puts a file's tensors into a declared model. ValueError lists every one that is missing, extra or misshapen, all at once.

    dtype None: float32, bfloat16 and quantised matrices stay as they are, float16 and float64 become float32; "float32" and
    "bfloat16" convert every matrix. Vectors (norms, biases) are float32 always. Arrays are used where they lie: a mapped file stays
    mapped. tied: names that a file may hold a second time, with the same bytes, and the names that they repeat.
    """
    parameters = model.named_parameters()
    theirs = names(table, model)
    transposed = tuple(transposed)
    wrong: dict[str, list[str]] = {"missing": [], "misshapen": [], "extra": [], "of an unknown dtype": []}
    for ours, name in theirs.items():
        if name not in tensors:
            wrong["missing"].append(name)
            continue
        expected, got = parameters[ours].shape, tuple(tensors[name].shape)
        if ours.endswith(transposed):
            expected = expected[::-1]
        if got != expected:
            wrong["misshapen"].append(f"{name} (expected {expected}, got {got})")
        if not isinstance(tensors[name], QuantizedArray) and tensors[name].dtype not in _FLOATS:
            wrong["of an unknown dtype"].append(f"{name} ({tensors[name].dtype})")
    patterns = [re.compile(p) for p in ignored]
    expected_names = set(theirs.values())
    for name, tensor in tensors.items():
        if name in expected_names or _harmless(name, tensor, tensors, tied, model):
            continue
        if name in tied or not any(p.fullmatch(name) for p in patterns):
            wrong["extra"].append(name)
    if any(wrong.values()):
        raise ValueError("the weights do not fit the configuration: " + "; ".join(_listed(k, v) for k, v in wrong.items() if v))
    for ours, name in theirs.items():
        array = tensors[name]
        if ours.endswith(transposed):
            array = np.ascontiguousarray(array.T)
        p = parameters[ours]
        p.data = _converted(array, "float32" if len(array.shape) == 1 else dtype)
        p.requires_grad = p.dtype == np.float32


_FLOATS = (np.float32, np.float16, np.float64, BFLOAT16)


def _converted(array: Any, dtype: str | None) -> Any:
    if dtype is None:
        keep = isinstance(array, QuantizedArray) or array.dtype in (np.float32, BFLOAT16)
        return array if keep else array.astype(np.float32)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"[load] dtype must be None, 'float32' or 'bfloat16', got {dtype!r}.")
    if isinstance(array, QuantizedArray):
        array = array.dequantize()
    target = np.dtype(np.float32) if dtype == "float32" else BFLOAT16
    return array if array.dtype == target else array.astype(target)


def _harmless(name: str, tensor: Any, tensors: Mapping[str, Any], tied: Mapping[str, str], model: LanguageModel) -> bool:
    """A tied tensor that is there a second time with the same bytes, or zero biases of a model that has none."""
    if name in tied:
        original = tensors.get(tied[name])
        return isinstance(tensor, np.ndarray) and isinstance(original, np.ndarray) and np.array_equal(tensor, original)
    if getattr(model.config, "bias", True) or not name.endswith(".bias") or name[:-5] + ".weight" not in tensors:
        return False
    return isinstance(tensor, np.ndarray) and not np.any(tensor)


def _listed(kind: str, items: list[str], limit: int = 12) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {kind}: {', '.join(items[:limit])}{more}"


def tensors_to_hf(module: ModuleType, model: LanguageModel) -> dict[str, Array]:
    """The model's weights under Hugging Face's names. Quantised weights are dequantised to float32.

    Norms and biases beside bfloat16 matrices are written as bfloat16 where that loses nothing, so that such a file comes back byte
    for byte.
    """
    parameters = model.named_parameters()
    half = any(p.ndim > 1 and _written_as(p.data) == BFLOAT16 for p in parameters.values())
    out: dict[str, Array] = {}
    for ours, name in names(table_of(module, model.config), model).items():
        array = parameters[ours].data
        if isinstance(array, Declared):
            raise ValueError(f"[save] {ours} has no value yet: load or initialise the model first.")
        if isinstance(array, QuantizedArray):
            array = array.plain() if array.kind == LOSSLESS else array.dequantize()
        array = backend.host(array)
        if half and array.ndim == 1 and np.array_equal(array.astype(BFLOAT16).astype(np.float32), array):
            array = array.astype(BFLOAT16)
        if ours.endswith(tuple(module.HF_TRANSPOSED)):
            array = array.T
        out[name] = np.ascontiguousarray(array)
    if hasattr(module, "hf_write"):
        out = module.hf_write(out, model)
    if isinstance(module.HF_CLASS, dict) and model.config.head is None:
        out = {name.removeprefix(module.HF_PREFIX): array for name, array in out.items()}
    return out


def parameter_dtype(parameters: Mapping[str, Tensor]) -> str:
    """The dtype in which the matrices are written, for a config.json: that of the first."""
    return next((str(_written_as(p.data)) for p in parameters.values() if p.ndim > 1), "float32")


def _written_as(array: Any) -> np.dtype[Any]:
    if isinstance(array, QuantizedArray):
        return BFLOAT16 if array.kind == LOSSLESS and array.value_bytes == 2 else np.dtype(np.float32)
    dtype: np.dtype[Any] = array.dtype
    return dtype
