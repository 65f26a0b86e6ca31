"""Writes tests/data/models: tiny random checkpoints and what transformers and torch make of them.

Run with a Python that has torch and transformers: `python tests/data/make_models.py`. The versions go into versions.json. Needed
only when a golden file is to be changed: the tests read what is committed.

    <name>/config.json, model.safetensors   checkpoints: gpt2, gpt2-untied, llama, llama-tied, llama-bias
    logits.npz          <name>.ids (2, T), <name>.logits (2, T, V) float32, for every checkpoint
    rope.npz            logits of `llama`, computed in float64, with every kind of RoPE scaling; rope.json holds the rope_parameters of each
    generation.json     prompts, settings of `generate`, and the new ids; a list
    training.npz, training.json   100 steps of AdamW from a checkpoint's weights: tokens, learning rates, losses, gradient norms
                        and the gradients of the first step
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parent / "models"
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"vocab_size": 97, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 3, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CHECKPOINTS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2-untied": GPT2Config(**GPT2 | {"n_inner": 50, "activation_function": "gelu", "tie_word_embeddings": False}),
    "llama": LlamaConfig(**LLAMA | {"rope_theta": 10000.0}),
    "llama-tied": LlamaConfig(
        **LLAMA
        | {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 40, "tie_word_embeddings": True},
        rope_parameters=LLAMA3 | {"rope_theta": 50000.0, "original_max_position_embeddings": 16},
    ),
    "llama-bias": LlamaConfig(
        **LLAMA | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
        attention_bias=True,
        mlp_bias=True,
    ),
}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-set": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.1,
    },
    "llama3": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 16},
}
SETTINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "eos": True},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": False, "eos": True},
    {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "eos": True},
    {"num_beams": 3, "length_penalty": 1.5, "early_stopping": "never", "eos": True},
    {"num_beams": 5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "eos": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": False, "eos": True, "min_new_tokens": 5},
]
TRAINING = {
    "steps": 100,
    "lr": 2e-3,
    "min_lr": 2e-4,
    "warmup": 10,
    "betas": [0.9, 0.99],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
}


def build(name: str, seed: int, std: float) -> torch.nn.Module:
    config = copy.deepcopy(CHECKPOINTS[name])
    config._attn_implementation = "eager"
    model = (GPT2LMHeadModel if name.startswith("gpt2") else LlamaForCausalLM)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and key.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * std + centre)
    return model


def generations(name: str, model: torch.nn.Module, vocab: int) -> list[dict]:
    rng = np.random.default_rng(5)
    out = []
    for number, settings in enumerate(SETTINGS):
        for prompt in (rng.integers(1, vocab, 3 + number).tolist(), rng.integers(1, vocab, 7).tolist()):
            call = {k: v for k, v in settings.items() if k != "eos"}
            ids = torch.tensor([prompt])
            eos = None
            if settings.get("eos"):  # a token that greedy decoding reaches soon, so that sequences do end
                greedy = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
                eos = int(greedy[0, len(prompt) + 5])
            got = model.generate(
                ids, do_sample=False, max_new_tokens=20, eos_token_id=eos, pad_token_id=0, **call,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            new = got.sequences[0, len(prompt) :].tolist()
            if "num_beams" not in call:  # greedy: a near tie would make the golden depend on rounding
                for scores in got.scores:
                    top = torch.topk(scores[0], 2).values
                    assert top[0] - top[1] > 1e-3, (name, settings)
            if eos in new and len(new) > 1:
                new = new[: new.index(eos) + 1]
            score = float(got.sequences_scores[0]) if "num_beams" in call else None
            out.append(
                {
                    "model": name,
                    "prompt": prompt,
                    "settings": call | {"eos_token_id": eos, "max_new_tokens": 20},
                    "ids": new,
                    "score": score,
                }
            )
    return out


def learning_rate(step: int) -> float:
    t = TRAINING
    if step < t["warmup"]:
        return t["lr"] * (step + 1) / (t["warmup"] + 1)
    ratio = (step - t["warmup"]) / (t["steps"] - t["warmup"])
    return t["min_lr"] + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (t["lr"] - t["min_lr"])


def training(model: torch.nn.Module, tokens: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    t = TRAINING
    model = copy.deepcopy(model).to(dtype).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": t["weight_decay"]},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=t["lr"], betas=tuple(t["betas"]), eps=t["eps"])
    losses, norms, first = [], [], {}
    for step in range(t["steps"]):
        batch = torch.tensor(tokens[step].astype(np.int64))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            first = {f"gradient.{k}": p.grad.detach().float().numpy().copy() for k, p in parameters.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), t["clip"])))
        optimiser.step()
        losses.append(float(loss))
    return {"losses": np.array(losses), "norms": np.array(norms), **first}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    logits, generation, rope, trained = {}, [], {}, {}
    rng = np.random.default_rng(0)
    for seed, name in enumerate(CHECKPOINTS):
        model = build(name, seed, 0.15)
        model.save_pretrained(OUT / name)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
        vocab = model.config.vocab_size
        ids = rng.integers(0, vocab, (2, 37))
        with torch.no_grad():
            logits[f"{name}.ids"], logits[f"{name}.logits"] = ids.astype(np.int32), model(torch.tensor(ids)).logits.numpy()
        if name in ("gpt2", "llama", "llama-tied"):
            generation += generations(name, model, vocab)
        if name in ("gpt2", "llama"):
            start = build(name, seed + 100, 0.05)
            start.save_pretrained(OUT / f"{name}-start")
            (OUT / f"{name}-start" / "generation_config.json").unlink(missing_ok=True)
            base = np.cumsum(rng.integers(0, 3, (TRAINING["steps"], 4, 25)), axis=-1)  # walks: something to learn
            tokens = ((base + rng.integers(0, vocab, (TRAINING["steps"], 4, 1))) % vocab).astype(np.uint8)
            got, exact = training(start, tokens, torch.float32), training(start, tokens, torch.float64)
            print(
                name,
                "losses",
                got["losses"][[0, 1, 50, 99]],
                "float32 against float64:",
                np.abs(got["losses"] - exact["losses"]).max(),
            )
            trained |= {f"{name}.{k}": v for k, v in got.items()} | {f"{name}.tokens": tokens, f"{name}.losses64": exact["losses"]}
    ids = rng.integers(0, LLAMA["vocab_size"], (1, 100))
    rope["ids"] = ids.astype(np.int32)
    for kind, parameters in ROPE.items():
        config = LlamaConfig(**LLAMA | {"max_position_embeddings": 64}, rope_parameters=dict(parameters))
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(build("llama", list(CHECKPOINTS).index("llama"), 0.15).state_dict())
        with torch.no_grad():
            rope[kind] = model.double()(torch.tensor(ids)).logits.float().numpy()  # float32's own error is half the bar
    np.savez_compressed(OUT / "logits.npz", **logits)
    np.savez_compressed(OUT / "rope.npz", **rope)
    np.savez_compressed(
        OUT / "training.npz", learning_rates=np.array([learning_rate(s) for s in range(TRAINING["steps"])]), **trained
    )
    (OUT / "rope.json").write_text(json.dumps(ROPE, indent=1))
    (OUT / "training.json").write_text(json.dumps(TRAINING, indent=1))
    (OUT / "generation.json").write_text("[\n" + ",\n".join(json.dumps(g) for g in generation) + "\n]\n")
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    (OUT / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


main()
