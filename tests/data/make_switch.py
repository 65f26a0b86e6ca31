"""Writes tests/data/switch: tiny random Switch Transformers, and what transformers and torch make of them.

Run with a Python that has torch and transformers: `python tests/data/make_switch.py`. Needed only when a golden file is to be changed.

    tied, untied/config.json, model.safetensors   untied: another activation, nothing dropped; the decoder has
                      no more layers than the encoder, for which the reference makes its cache
    golden.npz        for each: source (2, S), mask (2, S), ids (2, T), targets (2, T); in float64: logits, loss (with the routers' losses),
                      the four losses of the routers, gradient.<their name> of every parameter; losses (100,) of training
    generation.json   ids that `generate` gives, for each of the two sources
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

OUT = Path(__file__).parent / "switch"
torch.set_num_threads(1)
hf.logging.set_verbosity_error()
TINY = {"vocab_size": 61, "d_model": 22, "d_kv": 6, "d_ff": 38, "num_heads": 3, "relative_attention_num_buckets": 8}
TINY |= {
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.02,
}
CHECKPOINTS = {
    "tied": {"num_layers": 5, "num_sparse_encoder_layers": 2, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2,
             "num_experts": 5, "expert_capacity": 4},
    "untied": {"num_layers": 3, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
               "num_experts": 3, "expert_capacity": 64, "dense_act_fn": "gelu", "tie_word_embeddings": False},
}  # fmt: skip
SEEDS = {"tied": 1, "untied": 2}
SETTINGS = {"greedy": {}, "beam": {"num_beams": 3}, "beam-eos": {"num_beams": 4, "eos_token_id": 7, "length_penalty": 2.0}}
SIZES = {f"switch-base-{n}": (768, 3072, 12, 12, 6, n) for n in (8, 16, 32, 64, 128, 256)}
SIZES |= {"switch-large-128": (1024, 4096, 24, 16, 12, 128), "switch-c-2048": (2080, 6144, 15, 32, 15, 2048)}


def build(name: str, seed: int) -> hf.SwitchTransformersForConditionalGeneration:
    config = hf.SwitchTransformersConfig(**TINY, **CHECKPOINTS[name])
    config._attn_implementation = "eager"
    model = hf.SwitchTransformersForConditionalGeneration(config).eval()
    if name == "untied":  # transformers 5 would part these too; published files have one embedding, and a head
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            std = 0.4 if "relative" in key or "shared" in key or "router" in key else 0.15
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else std) + (1.0 if p.ndim == 1 else 0.0))
    return model


def save(model: torch.nn.Module, name: str) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(OUT / name)
    again = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens") if name == "tied" else ()
    kept = {k: v.detach().clone() for k, v in model.state_dict().items() if k.removesuffix(".weight") not in again}
    save_file(kept, OUT / name / "model.safetensors", metadata={"format": "pt"})


def double(model: torch.nn.Module) -> torch.nn.Module:
    """In float64 throughout: the router would keep to float32."""
    for part in model.modules():
        if hasattr(part, "classifier"):
            part.dtype = torch.float64
    return model.double()


def train(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        for (
            p
        ) in model.parameters():  # of an expert without tokens: zero, where the reference's loop over experts leaves out the step
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def count(d_model: int, d_ff: int, layers: int, heads: int, sparse: int, experts: int) -> int:
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads}
    sizes |= {"num_sparse_encoder_layers": sparse, "num_sparse_decoder_layers": sparse, "num_experts": experts}
    with torch.device("meta"):
        model = hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**sizes))
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    golden: dict[str, np.ndarray] = {}
    generation: dict[str, dict[str, list[list[int]]]] = {}
    for name, seed in SEEDS.items():
        model = build(name, seed)
        model.config.output_router_logits = True
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
        out = double(model)(**batch, output_router_logits=True)
        error = (rough - out.logits.detach()).abs() / out.logits.detach().abs().clamp(min=1)
        print(name, "error of torch's float32", float(error.max()), "largest logit", float(out.logits.detach().abs().max()))
        out.loss.backward()
        golden |= {f"{name}.{k}": v for k, v in zip(("source", "mask", "ids", "targets"), tensor.values(), strict=True)}
        golden |= {f"{name}.logits": out.logits.detach().numpy(), f"{name}.loss": np.array(out.loss.item())}
        for key in ("encoder_z_loss", "encoder_aux_loss", "decoder_z_loss", "decoder_aux_loss"):
            golden[f"{name}.{key}"] = np.array(out[key].item())
        for key, p in model.named_parameters():
            golden[f"{name}.gradient.{key}"] = (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
        model, generation[name] = build(name, seed), {}
        for setting, options in SETTINGS.items():
            options = {"eos_token_id": 60, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 14, **options}
            found = []
            for row in (source[0], source[1, :13]):
                new = model.generate(torch.tensor(row)[None], **options)[0, 1:].tolist()
                stop = next((i for i, t in enumerate(new) if t == options["eos_token_id"]), len(new) - 1)
                found.append(new[: stop + 1])
            generation[name][setting] = found
        golden[f"{name}.losses"] = np.array(train(double(build(name, seed)), batch, 100))
    np.savez_compressed(OUT / "golden.npz", **{k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in golden.items()})
    (OUT / "generation.json").write_text(json.dumps(generation))
    counts = {name: count(*sizes) for name, sizes in SIZES.items()}
    (OUT / "counts.json").write_text(json.dumps(counts, indent=1))
    print(f"torch {torch.__version__}, transformers {hf.__version__}", counts)


if __name__ == "__main__":
    main()
