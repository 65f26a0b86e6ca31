"""Writes tests/data/gguf: tiny random models of the families that people run as GGUF files, and their logits.

Run with a Python that has torch, transformers and gguf. Needed only when a file is to be changed. The keys, names, orders and offsets
are those of llama.cpp's convert_hf_to_gguf.py: llama.cpp itself loads the files, see tests/models/test_gguf_models.py.

    <family>.gguf     matrices in F16, vectors and routers in F32; mixtral-q8.gguf: matrices in Q8_0
    golden.npz        ids (2, 20); <family>: logits in float64 of the weights as the file has them
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf

OUT = Path(__file__).parent / "gguf"
KINDS = gguf.GGMLQuantizationType
SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": None}
MIXTRAL = SIZES | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
MODELS = {
    "mistral": hf.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "mixtral": hf.MixtralConfig(**MIXTRAL),
    "mixtral-q8": hf.MixtralConfig(**MIXTRAL),
    "qwen2": hf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=16),
    "gemma": hf.GemmaConfig(**SIZES, head_dim=16),
    "phi3": hf.Phi3Config(**SIZES, partial_rotary_factor=0.5, sliding_window=1024),
}
PARTS = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
    "gate": "ffn_gate_inp",
}


def name_of(theirs: str) -> str:
    parts = theirs.split(".")
    block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return block + PARTS[parts[-2]] + "." + parts[-1]


def rounded(model: torch.nn.Module, name: str) -> dict[str, tuple[np.ndarray, int]]:
    """Each tensor as the file holds it, and its type; the model gets the values that these have."""
    found = {}
    for key, p in model.named_parameters():
        array = p.detach().numpy()
        kind = KINDS.Q8_0 if name == "mixtral-q8" else KINDS.F16
        kind = KINDS.F32 if array.ndim == 1 or ".gate." in key else kind
        data = gguf.quants.quantize(array, kind)
        p.data = torch.tensor(gguf.quants.dequantize(data, kind))
        found[key] = data, kind
    return found


def write(path: Path, name: str, config: hf.PretrainedConfig, tensors: dict[str, tuple[np.ndarray, int]]) -> None:
    arch = "llama" if name.startswith("mi") else name
    writer = gguf.GGUFWriter(path, arch)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if name == "phi3":
        writer.add_rope_dimension_count(head // 2)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    else:
        writer.add_rope_dimension_count(head)
    if name not in ("qwen2", "phi3"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if "mixtral" in name:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for key, (data, kind) in tensors.items():
        if ".experts." in key:
            block = f"blk.{key.split('.')[2]}.ffn_"
            if "gate_up" in key:  # (E, 2 F, C), gate first
                half = data.shape[1] // 2
                writer.add_tensor(block + "gate_exps.weight", np.ascontiguousarray(data[:, :half]), raw_dtype=kind)
                writer.add_tensor(block + "up_exps.weight", np.ascontiguousarray(data[:, half:]), raw_dtype=kind)
            else:
                writer.add_tensor(block + "down_exps.weight", data, raw_dtype=kind)
            continue
        if name == "gemma" and "norm" in key:
            data = data + np.float32(1)
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):  # pairs of a head's rows side by side
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(name_of(key), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    OUT.mkdir(exist_ok=True)
    ids = np.random.default_rng(0).integers(0, 67, (2, 20))
    golden = {"ids": ids.astype(np.int32)}
    for seed, (name, config) in enumerate(MODELS.items()):
        config._attn_implementation = config._experts_implementation = "eager"
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in model.named_parameters():
                centre = 1.0 if p.ndim == 1 and key.endswith("norm.weight") and name != "gemma" else 0.0
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + centre)
        write(OUT / f"{name}.gguf", name, config, rounded(model, name))
        with torch.no_grad():
            golden[name] = model.double()(torch.tensor(ids)).logits.numpy()
        print(name, float(np.abs(golden[name]).max()))
    np.savez_compressed(OUT / "golden.npz", **{k: v if k == "ids" else v.astype(np.float32) for k, v in golden.items()})
    print(json.dumps({"torch": torch.__version__, "transformers": hf.__version__}))


if __name__ == "__main__":
    main()
