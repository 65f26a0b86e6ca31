"""From a GGUF file's metadata and tensors to a model, by the tables in the model's own file: GGUF_CONFIG, GGUF_NAMES, `gguf_read`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from fastlm.models.base import LanguageModel
from fastlm.models.convert import load_tensors
from fastlm.nn import rope_scaling

IGNORED = frozenset(
    ("rope.dimension_count", "attention.value_length", "tensor_data_layout", "expert_count", "expert_used_count", "vocab_size")
)
_NUMBERS = ("rope.dimension_count", "attention.value_length", "expert_count", "expert_used_count")  # beside those of GGUF_CONFIG
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # of the config, not of the model


def config_from_gguf(module: ModuleType, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The model's Config from a GGUF file's metadata. ValueError names every key that is missing or not supported."""
    keys = {k.removeprefix(arch + "."): v for k, v in metadata.items() if k.startswith(arch + ".")}
    fields = {field.name for field in dataclasses.fields(module.Config)}
    numbers = {k: _plain(keys[k]) for k in (*module.GGUF_CONFIG, *_NUMBERS) if k in keys}
    values: dict[str, Any] = {ours: numbers[theirs] for theirs, ours in module.GGUF_CONFIG.items() if theirs in numbers}
    embedding = tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        values["vocab_size"] = int(embedding.shape[0])  # the key may be missing, or count without the padding
    values["tied"] = "output.weight" not in tensors
    scaling = {k: keys.pop(k) for k in list(keys) if k.startswith("rope.scal")}
    wrong = [f"unknown key {arch}.{k} = {v!s:.60}" for k, v in keys.items() if k not in module.GGUF_CONFIG and k not in IGNORED]
    wrong += [f"{arch}.{k} must be a number, got {v!r:.60}" for k, v in numbers.items() if not isinstance(v, (int, float))]
    experts = numbers.get("expert_count", 0)
    if "n_expert" not in fields and isinstance(experts, (int, float)) and experts:
        wrong.append(f"{arch}.expert_count must be 0, got {experts}")
    required = {"context", "d_model", "n_layer", "n_head", "d_ff", "eps"}
    wrong += [f"missing key {arch}.{k}" for k, ours in module.GGUF_CONFIG.items() if ours in required and ours not in values]
    if wrong:
        raise ValueError("metadata: " + "; ".join(wrong))
    if "rope_base" in fields:
        values.setdefault("n_kv_head", values["n_head"])
        head_dim = values.get("head_dim", _head_dim(arch, values))
        if "head_dim" in fields:
            values["head_dim"] = head_dim
        if (width := numbers.get("attention.value_length", head_dim)) != head_dim:
            raise ValueError(f"metadata: {arch}.attention.value_length must be the head size {head_dim}, got {width}")
        turned = numbers.get("rope.dimension_count", head_dim)
        if "rotary" in fields:
            values["rotary"] = share = turned / head_dim
            if int(head_dim * share) < turned:  # the product is cut, as in the reference: 44 times 30 / 44 is 29.999...
                values["rotary"] = math.nextafter(share, 2)
        elif turned != head_dim:
            raise ValueError(f"metadata: {arch}.rope.dimension_count must be the head size {head_dim}, got {turned}")
        factors = tensors.get(_FACTORS[0])
        if factors is not None and 2 * factors.size != turned:
            raise ValueError(f"tensors: {_FACTORS[0]} must have a number for each 2 of {turned} dimensions, got {factors.size}")
        values["rope_scaling"] = scaling_from_gguf(scaling, tensors, float(values.get("rope_base", 1e4)))
    for field, name in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if field in fields:
            values[field] = name in tensors
    return module.Config(**values)


def load_gguf(module: ModuleType, model: LanguageModel, tensors: Mapping[str, Any], dtype: str | None) -> None:
    """Puts the tensors of a GGUF file into a declared model: read and renamed as the model's file says."""
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _FACTORS}
    if hasattr(module, "gguf_read"):
        tensors = module.gguf_read(tensors, model.config)
    load_tensors(model, tensors, module.GGUF_NAMES, dtype=dtype)


def _head_dim(arch: str, values: Mapping[str, Any]) -> int:
    for key, value, low in (
        ("attention.head_count", values["n_head"], 1),
        ("embedding_length", values["d_model"], values["n_head"]),
    ):
        if type(value) is not int or value < low:
            raise ValueError(f"metadata: {arch}.{key} must be {low} or more, got {value!r:.60}")
    return int(values["d_model"] // values["n_head"])


def _plain(value: Any) -> Any:
    """A number as Python has it; an array of one number repeated (a value for each layer) as that number."""
    if isinstance(value, np.ndarray) and value.size and np.all(value == value.flat[0]):
        value = value.flat[0]
    return value.item() if isinstance(value, np.generic) else value


_SCALING = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length")  # numbers


def scaling_from_gguf(keys: Mapping[str, Any], tensors: Mapping[str, Any], base: float) -> dict[str, Any] | None:
    """The Config's rope_scaling from the keys `rope.scal...` and the factors among the tensors."""
    if any(name in tensors for name in _FACTORS[1:]):
        raise ValueError("tensors: rope_factors_long and rope_factors_short, of the scaling 'longrope', are not supported")
    factors = tensors.get("rope_freqs.weight")
    if isinstance(factors, np.ndarray):
        dim = 2 * factors.size
        for factor in (8.0, 32.0):  # LLaMA 3.1 and 3.2: by name, so that the model can be saved with a config.json
            original = {"original_max_position_embeddings": 8192}
            known = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | original
            expected = rope_scaling(None, 1).frequencies(base, dim, 1) / rope_scaling(known, 1).frequencies(base, dim, 1)
            if np.allclose(factors.reshape(-1), expected, rtol=1e-4):
                return known
        return {"rope_type": "factors", "factors": tuple(float(f) for f in factors.reshape(-1))}
    kind = keys.get("rope.scaling.type", "linear" if "rope.scale_linear" in keys else "none")
    if not isinstance(kind, str):
        raise ValueError(f"metadata: rope.scaling.type must be a string, got {kind!r:.60}")
    plain = {key: _plain(value) for key, value in keys.items() if key in _SCALING}
    if wrong := [
        f"{key} must be a number, got {value!r:.60}" for key, value in plain.items() if not isinstance(value, (int, float))
    ]:
        raise ValueError("metadata: " + "; ".join(wrong))
    factor = float(plain.get("rope.scaling.factor", plain.get("rope.scale_linear", 1.0)))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn" and "rope.scaling.original_context_length" in plain:
        scaling["original_max_position_embeddings"] = int(plain["rope.scaling.original_context_length"])
    return scaling
