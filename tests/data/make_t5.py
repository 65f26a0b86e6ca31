"""Writes tests/data/t5: tiny random T5 checkpoints, and what transformers and torch make of them.

Run with a Python that has torch and transformers: `python tests/data/make_t5.py`. Needed only when a golden file is to be changed: the
tests read what is committed.

    v1.0, v1.1 (untied, transformers 4's form), v1.1-tied (transformers 5's form)/config.json, model.safetensors
    golden.npz        for each: source (2, S), mask (2, S), ids (2, T), targets (2, T); in float64, stored as float32: logits, loss,
                      gradient.<their name> of every parameter; losses (100,) of training, in float64
    generation.json   ids that `generate` gives for eight settings, for each of the two sources
    counts.json       parameters of the published sizes, counted on the meta device
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file

OUT = Path(__file__).parent / "t5"
torch.set_num_threads(1)
hf.logging.set_verbosity_error()
TINY = {"vocab_size": 61, "d_model": 22, "d_kv": 6, "d_ff": 38, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3}
TINY |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
CHECKPOINTS = {
    "v1.0": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "v1.1-tied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
SEEDS = {"v1.0": 7, "v1.1": 8, "v1.1-tied": 2}  # whose 100 steps meet no spike of the gradient: see conditioning.py
SETTINGS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beam-eos": {"num_beams": 4, "eos_token_id": 7},
    "beam-long": {"num_beams": 3, "length_penalty": 2.0, "eos_token_id": 7},
    "beam-early": {"num_beams": 3, "early_stopping": True, "eos_token_id": [7, 9]},
    "beam-never": {"num_beams": 2, "early_stopping": "never", "eos_token_id": 7, "length_penalty": 0.5},
    "penalty": {"repetition_penalty": 1.3},
    "no-repeat": {"no_repeat_ngram_size": 2, "num_beams": 2},
}
V1 = {"small": (512, 2048, 6, 8, 64), "base": (768, 3072, 12, 12, 64), "large": (1024, 4096, 24, 16, 64)}
V1 |= {"3b": (1024, 16384, 24, 32, 128), "11b": (1024, 65536, 24, 128, 128)}
V11 = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16)}
V11 |= {"xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}


def build(name: str, seed: int) -> hf.T5ForConditionalGeneration:
    config = hf.T5Config(**TINY, **CHECKPOINTS[name])
    config._attn_implementation = "eager"
    model = hf.T5ForConditionalGeneration(config).eval()
    if name == "v1.1":  # a head of its own
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre, std = (1.0, 0.2) if p.ndim == 1 else (0.0, 0.4 if "relative" in key or "shared" in key else 0.15)
            p.copy_(torch.randn(p.shape, generator=generator) * std + centre)
    return model


def save(model: hf.T5ForConditionalGeneration, name: str) -> None:
    folder = OUT / name
    model.save_pretrained(folder)
    if name == "v1.1":  # transformers 5 would tie it on saving
        tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items() if "embed_tokens" not in k}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text())
        raw["tie_word_embeddings"] = False
        del raw["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)


def train(model: hf.T5ForConditionalGeneration, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def count(**changes: object) -> int:
    with torch.device("meta"):
        model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32128, **changes))
    total = sum(p.numel() for p in model.parameters())
    untied = changes.get("tie_word_embeddings") is False  # the published files have a head of their own
    return total + (32128 * int(str(changes["d_model"])) if untied else 0)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    golden: dict[str, np.ndarray] = {}
    generation: dict[str, dict[str, list[list[int]]]] = {}
    for name, seed in SEEDS.items():
        model = build(name, seed)
        save(model, name)
        rng = np.random.default_rng(seed)
        source, ids = rng.integers(2, 61, (2, 19)), rng.integers(2, 61, (2, 15))
        ids[:, 0] = 0
        mask = np.ones((2, 19), np.int64)
        mask[1, 13:] = 0
        targets = np.concatenate([ids[:, 1:], np.ones((2, 1), np.int64)], 1)
        targets[1, 11:] = -100
        tensor = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": ids, "labels": targets}
        batch = {k: torch.tensor(v) for k, v in tensor.items()}
        rough = model(**batch).logits.detach()
        out = model.double()(**batch)
        error = (rough - out.logits.detach()).abs() / out.logits.detach().abs().clamp(min=1)
        print(name, "error of torch's float32", float(error.max()), "largest logit", float(out.logits.abs().max()))
        out.loss.backward()
        golden |= {f"{name}.{k}": v for k, v in zip(("source", "mask", "ids", "targets"), tensor.values(), strict=True)}
        golden |= {f"{name}.logits": out.logits.detach().numpy(), f"{name}.loss": np.array(out.loss.item())}
        for key, p in model.named_parameters():
            golden[f"{name}.gradient.{key}"] = p.grad.numpy()
        model = build(name, seed)
        generation[name] = {}
        for setting, options in SETTINGS.items():
            options = {"eos_token_id": 60, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 14, **options}
            ends = options["eos_token_id"] if isinstance(options["eos_token_id"], list) else [options["eos_token_id"]]
            found = []
            for row in (source[0], source[1, :13]):
                new = model.generate(torch.tensor(row)[None], **options)[0, 1:].tolist()
                stop = next((i for i, t in enumerate(new) if t in ends), len(new) - 1)
                found.append(new[: stop + 1])
            generation[name][setting] = found
        golden[f"{name}.losses"] = np.array(train(build(name, seed).double(), batch, 100))
    np.savez_compressed(OUT / "golden.npz", **{k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in golden.items()})
    (OUT / "generation.json").write_text(json.dumps(generation))
    counts = {}
    for size, (d, ff, n, h, dkv) in V1.items():
        counts[f"t5-{size}"] = count(d_model=d, d_ff=ff, num_layers=n, num_heads=h, d_kv=dkv)
    for size, (d, ff, n, h) in V11.items():
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        counts[f"t5-v1.1-{size}"] = count(d_model=d, d_ff=ff, num_layers=n, num_heads=h, d_kv=64, **gated)
    (OUT / "counts.json").write_text(json.dumps(counts, indent=1))
    print(f"torch {torch.__version__}, transformers {hf.__version__}", counts)


if __name__ == "__main__":
    main()
