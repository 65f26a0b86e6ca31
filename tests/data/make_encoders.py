"""Writes tests/data/encoders: tiny random encoders of every family and head, and what transformers and torch make of them.

Run with a Python that has torch and transformers: `python tests/data/make_encoders.py`. Needed only when a golden file is to be
changed: the tests read what is committed.

    <family>.<head>/config.json, model.safetensors   checkpoints as transformers writes them
    golden.npz   for every checkpoint: ids, mask, segments, targets (sentences), and in float64, stored as float32: hidden, logits,
                 loss, and gradient.<their name> of every parameter; for most heads instead digest.<their name>, the norm of the
                 gradient and its products with 16 vectors of +-1; left.* for a batch that is padded on the left
    curve.npz    100 steps of AdamW on bert.pretraining: ids, segments, targets, sentences, losses in float64
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AlbertConfig, BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

OUT = Path(__file__).parent / "encoders"
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 37,
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 22,
    "max_position_embeddings": 17,
}
FAMILIES = {
    "bert": ("Bert", BertConfig, COMMON | {"type_vocab_size": 3}),
    "roberta": ("Roberta", RobertaConfig, COMMON | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert": (
        "DistilBert",
        DistilBertConfig,
        {"vocab_size": 37, "dim": 15, "n_layers": 2, "n_heads": 3, "hidden_dim": 22, "max_position_embeddings": 17},
    ),
    "albert": (
        "Albert",
        AlbertConfig,
        COMMON | {"embedding_size": 7, "num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "electra": ("Electra", ElectraConfig, COMMON | {"embedding_size": 7}),
}
HEADS = {
    "bare": "Model",
    "masked_lm": "ForMaskedLM",
    "pretraining": "ForPreTraining",
    "next_sentence": "ForNextSentencePrediction",
    "replaced_token": "ForPreTraining",
    "sequence_classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "several_labels": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
}
LABELS = {"sequence_classification": 3, "regression": 1, "several_labels": 4, "token_classification": 5}
TASKS = ["bare", "masked_lm", "sequence_classification", "token_classification", "question_answering", "multiple_choice"]
CASES = {
    "bert": [*TASKS, "pretraining", "next_sentence", "regression", "several_labels"],
    "roberta": TASKS,
    "distilbert": TASKS,
    "albert": [*TASKS, "pretraining"],
    "electra": [*TASKS, "replaced_token"],
}


def build(family: str, head: str, seed: int, std: float) -> torch.nn.Module:
    name, config_class, settings = FAMILIES[family]
    config = config_class(**settings, **({"num_labels": LABELS[head]} if head in LABELS else {}))
    config._attn_implementation = "eager"
    model = getattr(transformers, name + HEADS[head])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and key.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * std + centre)
    return model


def batch(family: str, head: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three sequences, two of them padded on the right. Question answering sums over padding too, where torch's embedding has no
    gradient for the padding id: it gets none."""
    shape = (2, 3, 11) if head == "multiple_choice" else (3, 11)
    lengths = np.full(shape[:-1], 11)
    if head != "question_answering":
        lengths.reshape(-1)[1:3] = 7, 4
    pad = 1 if family == "roberta" else 0
    mask = (np.arange(11) < lengths[..., None]).astype(np.uint8)
    ids = np.where(mask, rng.integers(5, 37, shape), pad)
    out = {"ids": ids, "mask": mask}
    kinds = {"bert": 3, "albert": 2, "electra": 2}.get(family, 1)
    if kinds > 1:
        out["segments"] = np.sort(rng.integers(0, kinds, shape), axis=-1)
    asked = (rng.random(shape) < 0.3) & (mask == 1)
    asked[..., 0, 1] = True
    targets = {
        "masked_lm": np.where(asked, rng.integers(0, 37, shape), -100),
        "token_classification": np.where(asked, rng.integers(0, 5, shape), -100),
        "replaced_token": np.where(mask, rng.integers(0, 2, shape), -100),
        "next_sentence": np.array([0, 1, 1]),
        "sequence_classification": np.array([2, 0, 1]),
        "regression": np.array([0.3, -1.2, 2.0]),
        "several_labels": rng.integers(0, 2, (3, 4)).astype(np.float64),
        "question_answering": np.array([[2, 5], [0, 10], [4, 40]]),  # 40: not in this window
        "multiple_choice": np.array([2, 0]),
    }
    targets["pretraining"] = targets["masked_lm"]
    if head in targets:
        out["targets"] = targets[head]
    if head == "pretraining":
        out["sentences"] = np.array([1, 0, 1])
    return out


def arguments(head: str, b: dict[str, np.ndarray], family: str) -> dict[str, torch.Tensor]:
    t = {k: torch.tensor(v.astype(np.float64 if v.dtype.kind == "f" else np.int64)) for k, v in b.items()}
    out = {"input_ids": t["ids"]}
    out |= {"attention_mask": t["mask"]} if "mask" in t else {}
    out |= {"token_type_ids": t["segments"]} if "segments" in t else {}
    if head == "question_answering":
        out |= {"start_positions": t["targets"][:, 0], "end_positions": t["targets"][:, 1]}
    elif "targets" in t:
        out["labels"] = t["targets"]
    if "sentences" in t:
        out["sentence_order_label" if family == "albert" else "next_sentence_label"] = t["sentences"]
    return out


def logits(head: str, got: dict[str, torch.Tensor]) -> torch.Tensor | None:
    if head == "question_answering":
        return torch.stack([got["start_logits"], got["end_logits"]], -1)
    return got.get("prediction_logits", got.get("logits"))


def digest(gradient: np.ndarray) -> np.ndarray:
    signs = np.random.default_rng(gradient.size).integers(0, 2, (16, gradient.size)) * 2.0 - 1.0
    return np.array([np.linalg.norm(gradient), *(signs @ gradient.reshape(-1).astype(np.float64))])


def curve(rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = build("bert", "pretraining", 99, 0.1)
    model.save_pretrained(OUT / "bert.start")
    model = model.double()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    b = {
        "ids": rng.integers(5, 37, (100, 4, 12)).astype(np.uint8),
        "segments": np.sort(rng.integers(0, 3, (100, 4, 12)), axis=-1).astype(np.uint8),
        "sentences": rng.integers(0, 2, (100, 4)).astype(np.uint8),
    }
    b["targets"] = np.where(rng.random((100, 4, 12)) < 0.25, (b["ids"] * 3 + 1) % 37, -100).astype(np.int8)
    losses = []
    for step in range(100):
        loss = model(**arguments("pretraining", {k: v[step] for k, v in b.items()}, "bert")).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    print("curve", losses[0], losses[-1])
    return b | {"losses": np.array(losses)}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    rng = np.random.default_rng(0)
    golden = {}
    for seed, (family, head) in enumerate((f, h) for f, heads in CASES.items() for h in heads):
        model = build(family, head, seed, 0.15)
        name = f"{family}.{head}"
        model.save_pretrained(OUT / name)
        b = batch(family, head, rng)
        model = model.double()
        got = model(**arguments(head, b, family))
        if "loss" in got:
            got["loss"].backward()
            b["loss"] = got["loss"].detach().numpy()
            gradients = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
            if head in ("masked_lm", "pretraining"):
                b |= {f"gradient.{k}": g.astype(np.float32) for k, g in gradients.items()}
            else:
                b |= {f"digest.{k}": digest(g) for k, g in gradients.items()}
        else:
            b["hidden"] = got["last_hidden_state"].detach().numpy().astype(np.float32)
            if got.get("pooler_output") is not None:
                b["pooled"] = got["pooler_output"].detach().numpy().astype(np.float32)
        if logits(head, got) is not None:
            b["logits"] = logits(head, got).detach().numpy().astype(np.float32)
        if head == "pretraining":
            sentences = got["sop_logits"] if family == "albert" else got["seq_relationship_logits"]
            b["sentence_logits"] = sentences.detach().numpy().astype(np.float32)
        if head == "masked_lm":
            left = {k: b[k][:, ::-1].copy() for k in ("ids", "mask", "segments") if k in b}
            with torch.no_grad():
                b["left.logits"] = model(**arguments(head, left, family)).logits.numpy().astype(np.float32)
        golden |= {f"{name}.{k}": v.astype(np.int16) if v.dtype.kind == "i" else v for k, v in b.items()}
        print(name, sum(p.numel() for p in model.parameters()), float(b.get("loss", 0)))
    np.savez_compressed(OUT / "golden.npz", **golden)
    np.savez_compressed(OUT / "curve.npz", **curve(rng))
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    (OUT / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


main()
