"""Writes tests/data/xlnet: tiny random XLNets and what transformers and torch make of them.

Run with a Python that has torch and transformers: `python tests/data/make_xlnet.py`. Needed only when a golden file is to be
changed: the tests read what is committed.

    <name>/config.json, model.safetensors   checkpoints as transformers writes them
    golden.npz   for every checkpoint and case: its inputs, logits, loss, mems and gradient.<their name>, computed in float64 and
                 stored as float32; curve.*: 100 steps; greedy and beam ids of transformers' generate
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

OUT = Path(__file__).parent / "xlnet"
torch.set_num_threads(1)
COMMON = {"vocab_size": 41, "d_model": 18, "n_layer": 3, "n_head": 3, "d_inner": 29}
MODELS = {
    "bi": {},
    "tanh": {"ff_activation": "gelu_new", "mem_len": 7, "reuse_len": 5, "clamp_len": 6, "n_layer": 2},
    "uni": {"attn_type": "uni", "ff_activation": "relu", "mem_len": None, "n_layer": 2},
}
B, T, M, N = 3, 11, 7, 4


def build(name: str, seed: int) -> XLNetLMHeadModel:
    model = XLNetLMHeadModel(XLNetConfig(**(COMMON | MODELS[name]))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if key.endswith("layer_norm.weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + centre)
    return model


def cases(rng: np.random.Generator, layers: int) -> dict[str, dict[str, np.ndarray]]:
    ids = rng.integers(6, 41, (B, T))
    mask = np.arange(T) >= np.array([0, 4, 1])[:, None]  # padding on the left
    segments = np.sort(rng.integers(0, 3, (B, T)), axis=1)
    perm, mapping = np.zeros((B, T, T)), np.zeros((B, N, T))
    for b in range(B):
        order = rng.permutation(T)
        perm[b] = order[:, None] <= order[None]  # sees what comes earlier in the order, not itself
        asked = np.sort(rng.permutation(np.flatnonzero(mask[b]))[: N - (b == 2)])
        mapping[b, np.arange(len(asked)), asked] = 1
    targets = np.where(mapping.any(2), rng.integers(0, 41, (B, N)), -100)
    mems = rng.standard_normal((layers, B, M, 18)).astype(np.float32)
    plain = {"ids": ids, "targets": rng.integers(0, 41, (B, T))}
    return {
        "plain": plain,
        "padded": plain | {"mask": mask, "segments": segments},
        "memory": plain | {"mems": mems, "segments": segments},
        "streams": {"ids": ids, "perm_mask": perm, "target_mapping": mapping, "targets": targets},
        "all": {
            "ids": ids, "mask": mask, "segments": segments, "perm_mask": perm, "target_mapping": mapping, "targets": targets, "mems": mems
        },
    }  # fmt: skip


THEIRS = {"ids": "input_ids", "mask": "attention_mask", "segments": "token_type_ids", "targets": "labels"}


def arguments(case: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in case.items():
        t = torch.tensor(value)
        if key == "mems":
            out[key] = [layer.transpose(0, 1).to(dtype) for layer in t]
        elif key in ("ids", "segments", "targets"):
            out[THEIRS[key]] = t.long()
        else:
            out[THEIRS.get(key, key)] = t.to(dtype)
    return out


def widen(model: XLNetLMHeadModel) -> XLNetLMHeadModel:
    """In float64, with the angles in float32 as ever: the two-stream code does not widen them itself."""
    wide = model.double()
    angles = wide.transformer.relative_positional_encoding
    wide.transformer.relative_positional_encoding = lambda *a, **k: angles(*a, **k).double()
    return wide


def curve(model: XLNetLMHeadModel) -> dict[str, np.ndarray]:
    """100 steps of AdamW on permutation LM; a token that is asked follows from the one before it."""
    rng = np.random.default_rng(9)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    ids = (rng.integers(0, 41, (100, 4, 1)) + 3 * np.arange(8)) % 41
    order = np.stack([[rng.permutation(8) for _ in range(4)] for _ in range(100)])  # the place of each token in the order
    perm = order[..., :, None] <= order[..., None, :]
    asked = np.sort(np.argsort(order, -1)[..., -3:], -1)
    mapping = asked[..., None] == np.arange(8)
    b = {"ids": ids, "segments": np.sort(rng.integers(0, 2, (100, 4, 8)), -1), "perm_mask": perm, "target_mapping": mapping}
    b["targets"] = np.take_along_axis(ids, asked, -1)
    losses = []
    for step in range(100):
        loss = model(**arguments({k: v[step] for k, v in b.items()}, torch.float64)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    print("curve", losses[0], losses[-1])
    return {f"curve.{k}": v.astype(np.uint8) for k, v in b.items()} | {"curve.losses": np.array(losses)}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    golden: dict[str, np.ndarray] = {}
    for seed, name in enumerate(MODELS):
        model = build(name, seed)
        model.save_pretrained(OUT / name)
        for file in (OUT / name).glob("generation_config.json"):
            file.unlink()
        config = json.loads((OUT / name / "config.json").read_text())
        config.pop("transformers_version", None)
        (OUT / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(6, 41, n).tolist() for n in (9, 1, 14)]
        for i, prompt in enumerate(prompts):
            common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 5}
            ids = torch.tensor([prompt])
            golden[f"{name}.prompt{i}"] = np.array(prompt, np.int32)
            golden[f"{name}.greedy{i}"] = model.generate(ids, **common)[0, len(prompt) :].numpy().astype(np.int32)
            if name == "uni":  # transformers cannot add a mask to the causal one of more than one sequence
                continue
            beams = model.generate(ids, num_beams=3, **common)
            golden[f"{name}.beam{i}"] = beams[0, len(prompt) :].numpy().astype(np.int32)
        wide = widen(model)
        for case, given in cases(rng, model.config.n_layer).items():
            if name == "uni" and case not in ("plain", "memory"):
                continue
            wide.zero_grad()
            got = wide(**arguments(given, torch.float64), use_mems=True)
            got.loss.backward()
            key = f"{name}.{case}"
            for k, v in given.items():
                golden[f"{key}.{k}"] = v.astype(np.float32 if k == "mems" else np.int32)
            golden[f"{key}.logits"] = got.logits.detach().numpy().astype(np.float32)
            golden[f"{key}.loss"] = got.loss.detach().numpy().astype(np.float32)
            golden[f"{key}.kept"] = np.stack([m.transpose(0, 1).numpy() for m in got.mems]).astype(np.float32)
            if case in ("memory", "padded", "all"):
                for parameter, p in wide.named_parameters():
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    golden[f"{key}.gradient.{parameter}"] = grad.numpy().astype(np.float32)
    golden |= curve(widen(XLNetLMHeadModel.from_pretrained(OUT / "bi").eval()))
    np.savez_compressed(OUT / "golden.npz", **golden)


main()
