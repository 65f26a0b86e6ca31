"""Between a model and the files of others: configurations and names, by the tables in the model's own file. Strict both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from fastlm.backend import Array
from fastlm.checkpoint import QuantizedArray
from fastlm.models.base import CausalLM, names
from fastlm.nn import Declared
from fastlm.tensor import Tensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Keys of config.json that say nothing about the forward pass.
# fmt: off
IGNORED = frozenset((
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "output_past",
    "gradient_checkpointing", "unsloth_version", "transformers.js_config", "return_dict", "output_hidden_states",
    "output_attentions", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_encoder_decoder", "finetuning_task",
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
    if wrong:
        raise ValueError(f"config.json of model_type {module.HF_TYPE!r}: " + "; ".join(wrong))
    return module.Config(**values)


def config_to_hf(module: ModuleType, config: Any) -> dict[str, Any]:
    """The model's Config as a config.json that transformers reads."""
    raw: dict[str, Any] = {"architectures": [module.HF_CLASS], "model_type": module.HF_TYPE}
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
    return raw | {k: v for k, v in module.HF_FIXED.items() if k in ("hidden_act", "scale_attn_weights")}


def load_tensors(
    model: CausalLM,
    tensors: Mapping[str, Any],
    table: Mapping[str, str],
    transposed: Iterable[str] = (),
    ignored: Iterable[str] = (),
    dtype: str | None = None,
) -> None:
    """Puts a file's tensors into a declared model. ValueError lists every one that is missing, extra or misshapen, all at once.

    dtype None: float32, bfloat16 and quantised matrices stay as they are, float16 and float64 become float32; "float32" and
    "bfloat16" convert every matrix. Vectors (norms, biases) are float32 always. Arrays are used where they lie: a mapped file stays
    mapped.
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
        if (
            name not in expected_names
            and not any(p.fullmatch(name) for p in patterns)
            and not _harmless(name, tensor, tensors, table, model)
        ):
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


def _harmless(name: str, tensor: Any, tensors: Mapping[str, Any], table: Mapping[str, str], model: CausalLM) -> bool:
    """A tied head that is there a second time with the same bytes, or zero biases of a model that has none."""
    if model.head is None and name == f"{table['head']}.weight":
        embedding = tensors.get(f"{table['token_embedding']}.weight")
        return isinstance(tensor, np.ndarray) and isinstance(embedding, np.ndarray) and np.array_equal(tensor, embedding)
    if getattr(model.config, "bias", True) or not name.endswith(".bias") or name[:-5] + ".weight" not in tensors:
        return False
    return isinstance(tensor, np.ndarray) and not np.any(tensor)


def _listed(kind: str, items: list[str], limit: int = 12) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {kind}: {', '.join(items[:limit])}{more}"


def tensors_to_hf(module: ModuleType, model: CausalLM) -> dict[str, Array]:
    """The model's weights under Hugging Face's names. Quantised weights are dequantised to float32.

    Norms and biases beside bfloat16 matrices are written as bfloat16 where that loses nothing, so that such a file comes back byte
    for byte.
    """
    parameters = model.named_parameters()
    half = any(p.ndim > 1 and p.dtype == BFLOAT16 for p in parameters.values())
    out: dict[str, Array] = {}
    for ours, name in names(module.HF_NAMES, model).items():
        array = parameters[ours].data
        if isinstance(array, Declared):
            raise ValueError(f"[save] {ours} has no value yet: load or initialise the model first.")
        if isinstance(array, QuantizedArray):
            array = array.dequantize()
        if half and array.ndim == 1 and np.array_equal(array.astype(BFLOAT16).astype(np.float32), array):
            array = array.astype(BFLOAT16)
        if ours.endswith(tuple(module.HF_TRANSPOSED)):
            array = array.T
        out[name] = np.ascontiguousarray(array)
    if hasattr(module, "hf_zero_biases"):
        out |= module.hf_zero_biases(model)
    return out


def parameter_dtype(parameters: Mapping[str, Tensor]) -> str:
    """The dtype of the matrices, for a config.json: that of the first."""
    return next((str(p.dtype) for p in parameters.values() if p.ndim > 1), "float32")
