"""Writes tests/data/experts: a tiny random Mixtral and what transformers and torch make of it, in float64.

Run with a Python that has torch and transformers. Needed only when a golden file is to be changed.

    mixtral/config.json, model.safetensors   experts one by one, the form that checkpoints have
    fused.safetensors   the experts of layer 0 stacked, the form that transformers 5 holds in memory
    golden.npz          ids, logits; loss with the auxiliary loss, gradient.<name> of every parameter; curve.ids, curve.losses
    generation.json     prompts, settings of `generate`, and the new ids
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import MixtralConfig, MixtralForCausalLM

OUT = Path(__file__).parent / "experts"
torch.set_num_threads(1)
CONFIG = MixtralConfig(
    vocab_size=61, hidden_size=30, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    head_dim=10, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2, router_aux_loss_coef=0.05,
    output_router_logits=True, sliding_window=7, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
CONFIG._attn_implementation = "eager"
CONFIG._experts_implementation = "eager"  # the grouped product of torch knows no float64


def build() -> torch.nn.Module:
    model = MixtralForCausalLM(copy.deepcopy(CONFIG)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (1.0 if p.ndim == 1 else 0.0))
    return model


def loss_of(model: torch.nn.Module, ids: np.ndarray) -> torch.Tensor:
    """Next tokens inside `ids`: the inputs are all but the last."""
    inputs, targets = torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:])
    out = model(inputs, output_router_logits=True)
    return torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten()) + 0.05 * out_aux(out)


def out_aux(out: object) -> torch.Tensor:
    """mixtral_load_balancing_loss from the router's logits in float64: the reference sums its own in float32."""
    p = torch.cat(tuple(out.router_logits)).softmax(-1)
    f = torch.nn.functional.one_hot(p.topk(2, -1).indices, p.shape[-1]).to(p.dtype).sum(1).mean(0)
    aux = p.shape[-1] * (f * p.mean(0)).sum()
    assert abs(aux.item() - out.aux_loss.item()) < 1e-5
    return aux


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    model = build()
    model.save_pretrained(OUT / "mixtral")
    (OUT / "mixtral" / "generation_config.json").unlink(missing_ok=True)
    fused = {k: v.numpy() for k, v in model.state_dict().items() if "layers.0.mlp" in k}
    save_file(fused, OUT / "fused.safetensors")
    wide = copy.deepcopy(model).double()
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 61, (3, 23))
    golden = {"ids": ids.astype(np.int32), "logits": wide(torch.tensor(ids)).logits.detach().numpy()}
    loss = loss_of(wide, ids)
    loss.backward()
    golden["loss"] = np.array(loss.item())
    for name, p in wide.named_parameters():
        golden[f"gradient.{name}"] = p.grad.numpy()
    train = copy.deepcopy(model).double()
    optimizer = torch.optim.AdamW(train.parameters(), lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    batches, losses = rng.integers(0, 61, (25, 2, 18)), []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(train, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    golden |= {"curve.ids": batches.astype(np.int32), "curve.losses": np.array(losses)}
    np.savez_compressed(OUT / "golden.npz", **golden)
    found = []
    for settings in ({}, {"num_beams": 3}):
        for n in (4, 9):
            prompt = rng.integers(3, 61, n).tolist()
            got = wide.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=14, eos_token_id=None, pad_token_id=0,
                output_router_logits=False, **settings,
            )  # fmt: skip
            found.append({"prompt": prompt, "settings": settings, "ids": got[0, n:].tolist()})
    (OUT / "generation.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
