"""Writes tests/data/decoders: tiny random checkpoints of decoder families, and what transformers and torch make of them.

Run with a Python that has torch and transformers: `python tests/data/make_decoders.py`. Needed only when a golden file is to be
changed: the tests read what is committed.

    <name>/config.json, model.safetensors   checkpoints as transformers writes them
    golden.npz   for every checkpoint: ids (2, T), and in float64, stored as float32: logits, loss, gradient.<their name> of every
                 parameter; prompt (1, N) and greedy (M,), the ids that follow it up to a near tie; states (L + 1, 2, T, C),
                 what goes into each layer, and out of the last one (after the final norm)
    curves.npz   100 steps of AdamW on every checkpoint, in float64: tokens (100, 3, 17), <name> (100,), the losses
    counts.json  parameters of published configurations, counted on the meta device
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf

OUT = Path(__file__).parent / "decoders"
torch.set_num_threads(1)
hf.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 61,
    "hidden_size": 28,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEAD = {"head_dim": 6}
CHECKPOINTS = {
    "mistral": hf.MistralConfig(**COMMON | HEAD, sliding_window=7),
    "qwen2": hf.Qwen2Config(**COMMON | {"hidden_size": 24}, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-tied": hf.Qwen2Config(**COMMON | {"hidden_size": 24}, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**COMMON | HEAD),
    "gemma": hf.GemmaConfig(**COMMON | {"head_dim": 10, "num_key_value_heads": 1}),
    "phi3": hf.Phi3Config(**COMMON | {"hidden_size": 24}, sliding_window=9),
    "phi3-partial": hf.Phi3Config(
        **COMMON | {"hidden_size": 32},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "gpt1": hf.OpenAIGPTConfig(vocab_size=61, n_positions=64, n_embd=28, n_layer=3, n_head=4),
}
QWEN25 = {"tie_word_embeddings": True}
QWEN3 = {"num_key_value_heads": 8}
PHI = {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}


def sizes(d: int, ff: int, n: int, h: int, **more: object) -> dict:
    return {"hidden_size": d, "intermediate_size": ff, "num_hidden_layers": n, "num_attention_heads": h} | more


PUBLISHED = {
    "gpt1": hf.OpenAIGPTConfig(),
    "mistral-7b": hf.MistralConfig(),
    "mistral-7b-v0.3": hf.MistralConfig(vocab_size=32768),
    "qwen2.5-0.5b": hf.Qwen2Config(**sizes(896, 4864, 24, 14, num_key_value_heads=2), **QWEN25),
    "qwen2.5-1.5b": hf.Qwen2Config(**sizes(1536, 8960, 28, 12, num_key_value_heads=2), **QWEN25),
    "qwen2.5-3b": hf.Qwen2Config(**sizes(2048, 11008, 36, 16, num_key_value_heads=2), **QWEN25),
    "qwen2.5-7b": hf.Qwen2Config(**sizes(3584, 18944, 28, 28, num_key_value_heads=4), vocab_size=152064),
    "qwen3-0.6b": hf.Qwen3Config(**sizes(1024, 3072, 28, 16), **QWEN3, tie_word_embeddings=True),
    "qwen3-1.7b": hf.Qwen3Config(**sizes(2048, 6144, 28, 16), **QWEN3, tie_word_embeddings=True),
    "qwen3-4b": hf.Qwen3Config(**sizes(2560, 9728, 36, 32), **QWEN3, tie_word_embeddings=True),
    "qwen3-8b": hf.Qwen3Config(**sizes(4096, 12288, 36, 32), **QWEN3),
    "qwen3-14b": hf.Qwen3Config(**sizes(5120, 17408, 40, 40), **QWEN3),
    "qwen3-32b": hf.Qwen3Config(**sizes(5120, 25600, 64, 64), **QWEN3),
    "gemma-2b": hf.GemmaConfig(**sizes(2048, 16384, 18, 8, num_key_value_heads=1)),
    "gemma-7b": hf.GemmaConfig(),
    "phi-3-mini": hf.Phi3Config(),
    "phi-3-medium": hf.Phi3Config(**PHI),
    "phi-4": hf.Phi3Config(vocab_size=100352, **PHI),
}


def make(config: hf.PretrainedConfig) -> torch.nn.Module:
    if config.model_type == "openai-gpt":
        return hf.OpenAIGPTLMHeadModel(config)
    return hf.AutoModelForCausalLM.from_config(config)


def build(name: str, seed: int, std: float) -> torch.nn.Module:
    config = copy.deepcopy(CHECKPOINTS[name])
    config._attn_implementation = "eager"
    model = make(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and key.endswith("weight") and name != "gemma" else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * std + centre)
    return model


def greedy(model: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """By whole forward passes, without a cache; up to the first near tie."""
    ids, new = prompt, []
    for _ in range(count):
        top = torch.topk(model(ids).logits[0, -1], 2)
        if top.values[0] - top.values[1] < 1e-3:
            break
        new.append(int(top.indices[0]))
        ids = torch.cat([ids, top.indices[None, :1]], dim=1)
    assert len(new) >= 6
    return new


def curve(model: torch.nn.Module, tokens: np.ndarray, lr: float = 1e-3) -> np.ndarray:
    """The losses of 100 steps from the checkpoint on; dropout is off. The rate: see conditioning.py."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    losses = []
    for batch in torch.tensor(tokens.astype(np.int64)):
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    golden: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    walks = np.random.default_rng(1)
    tokens = ((np.cumsum(walks.integers(0, 3, (100, 3, 17)), axis=-1) + walks.integers(0, 61, (100, 3, 1))) % 61).astype(np.uint8)
    curves = {"tokens": tokens}
    for seed, name in enumerate(CHECKPOINTS):
        model = build(name, 20 + seed, 0.2)
        model.save_pretrained(OUT / name)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
        ids = torch.tensor(rng.integers(0, 61, (2, 24)))
        exact = copy.deepcopy(model).double()
        for module in exact.modules():  # a buffer that .double() cannot reach keeps float32's rounding, as the model has it
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        out = exact(ids, output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        golden[f"{name}.ids"] = ids.numpy().astype(np.int32)
        golden[f"{name}.logits"] = out.logits.detach().float().numpy()
        golden[f"{name}.states"] = torch.stack(out.hidden_states).detach().float().numpy()
        golden[f"{name}.loss"] = np.float64(loss.detach())
        for key, p in exact.named_parameters():
            golden[f"{name}.gradient.{key}"] = p.grad.float().numpy()
        with torch.no_grad():
            golden[f"{name}.prompt"] = ids[:1, :5].numpy().astype(np.int32)
            golden[f"{name}.greedy"] = np.array(greedy(exact, ids[:1, :5], 16), np.int32)
        error = (model(ids).logits - out.logits).abs() / out.logits.abs().clamp(min=1)
        print(
            f"{name:13} float32 of torch against float64: {float(error.max()):.1e}, logits up to {float(out.logits.abs().max()):.1f}"
        )
        curves[name] = curve(copy.deepcopy(model).double(), tokens)
    np.savez_compressed(OUT / "golden.npz", **golden)
    np.savez_compressed(OUT / "curves.npz", **curves)
    counts = {}
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in make(config).parameters())
    (OUT / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
