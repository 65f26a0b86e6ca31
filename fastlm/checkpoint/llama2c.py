"""Checkpoints of karpathy/llama2.c, version 0 (export.py, legacy_export): seven int32, then float32 tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlm.checkpoint.errors import FormatError
from fastlm.checkpoint.jsonfile import write_json
from fastlm.checkpoint.mapping import map_file, view
from fastlm.checkpoint.safetensors import write_safetensors

_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_HEADER = 28
_MAX = 1 << 24  # of any size in the header


def read_llama2c(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """(config, tensors): what config.json of a LlamaForCausalLM folder says, and its tensors by their names there.

    The rows of q_proj and k_proj are permuted from Meta's interleaved RoPE pairs to the half-split order of Hugging Face, which
    copies them; the other tensors are read-only views of the mapped file. A negative vocabulary size means an untied output matrix.
    Raises FormatError unless the file has exactly the size that its header asks for.
    """
    memory = map_file(path, "llama2.c")
    size = len(memory)
    if size < _HEADER:
        raise FormatError(path, f"expected a llama2.c file with a header of {_HEADER} bytes, got {size} bytes", 0)
    if memory[:4] == b"24ka":
        raise FormatError(path, "expected version 0 of the llama2.c format, got a later one: export with --version 0", 0)
    values = [int(n) for n in np.frombuffer(memory, "<i4", len(_FIELDS))]
    tied = values[5] > 0
    values[5] = abs(values[5])
    for i, (field, n) in enumerate(zip(_FIELDS, values, strict=True)):
        if not 1 <= n <= _MAX:
            raise FormatError(path, f"{field} must be from 1 to {_MAX}, got {n}: not a llama2.c file of version 0", 4 * i)
    C, F, L, H, G, V, P = values
    if C % H or H % G or C // H % 2:
        raise FormatError(path, f"n_heads = {H} must divide dim = {C} into even heads, n_kv_heads = {G} must divide n_heads", 0)
    D = C // H
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("embed", (V, C)),
        ("input_layernorm", (L, C)),
        ("self_attn.q_proj", (L, C, C)),
        ("self_attn.k_proj", (L, G * D, C)),
        ("self_attn.v_proj", (L, G * D, C)),
        ("self_attn.o_proj", (L, C, C)),
        ("post_attention_layernorm", (L, C)),
        ("mlp.gate_proj", (L, F, C)),
        ("mlp.down_proj", (L, C, F)),
        ("mlp.up_proj", (L, F, C)),
        ("norm", (C,)),
        ("cos and sin", (2, P, D // 2)),  # not used: they follow from the config
    ]
    if not tied:
        layout.append(("head", (V, C)))
    expected = _HEADER
    for _, shape in layout:
        count = 4
        for n in shape:
            count *= n
        expected += count
    if size != expected:
        raise FormatError(
            path, f"expected {expected} bytes for the sizes in the header, got {size}: {dict(zip(_FIELDS, values, strict=True))}"
        )

    tensors: dict[str, NDArray[np.float32]] = {}
    at = _HEADER
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    for name, shape in layout:
        array = view(memory, np.dtype(np.float32), shape, at)
        at += array.nbytes
        if name in names:
            tensors[names[name]] = array
        elif name != "cos and sin":
            for layer in range(L):
                weight = array[layer]
                if name in ("self_attn.q_proj", "self_attn.k_proj"):
                    weight = half_split(weight, D)
                tensors[f"model.layers.{layer}.{name}.weight"] = weight
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": C,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "vocab_size": V,
        "max_position_embeddings": P,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return config, tensors


def half_split(weight: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows (heads * head_dim, in) of a projection: pairs (2i, 2i + 1) of each head go to (i, i + head_dim / 2). A copy."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, columns)


def convert_llama2c(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    tokenizer: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a llama2.c checkpoint as a Hugging Face folder: config.json, generation_config.json, model.safetensors.

    `tokenizer` is called with the folder and writes the tokenizer's files there, as Tokenizer.save does. Returns the folder.
    """
    config, tensors = read_llama2c(path)
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    write_safetensors(where, tensors)
    # llama2.c ends a text at the token that begins one (run.c, generate).
    write_json(where / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [1, 2], "do_sample": False})
    write_json(where / "config.json", config)
    if tokenizer is not None:
        tokenizer(where)
    return where
