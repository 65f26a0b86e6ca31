"""Writes sampling.json: which tokens transformers' logits processors keep, for random small rows and settings.

python tests/data/make_sampling.py        # needs torch and transformers; the tests do not
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

torch.sort = functools.partial(torch.sort, stable=True)


def processed(case: dict) -> np.ndarray:
    """The scores after the processors, in the order of transformers' generate."""
    ids, scores = torch.tensor([case["previous"]], dtype=torch.long), torch.tensor([case["logits"]], dtype=torch.float32)
    steps = [RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]), TemperatureLogitsWarper(case["temperature"])]
    if case["top_k"]:
        steps.append(TopKLogitsWarper(case["top_k"]))
    if case["top_p"] < 1:
        steps.append(TopPLogitsWarper(case["top_p"]))
    if case["min_p"]:
        steps.append(MinPLogitsWarper(case["min_p"]))
    for step in steps:
        scores = step(ids, scores)
    return scores[0].numpy()


def main() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for i in range(240):
        V = int(rng.integers(1, 40))
        logits = rng.standard_normal(V) * 2
        logits = np.round(logits, 1 if i % 3 else 6).astype(np.float32)  # one decimal: many ties
        if i % 7 == 0:
            logits[rng.random(V) < 0.3] = -10000.0
        case = {
            "logits": [float(str(x)) for x in logits],
            "previous": [int(x) for x in rng.integers(0, V, int(rng.integers(1, 6)))],
            "repetition_penalty": float(rng.choice([1.0, 1.2, 0.7])),
            "temperature": float(rng.choice([0.5, 0.8, 1.0, 1.5])),
            "top_k": int(rng.choice([0, 1, 3, 10, 100])),
            "top_p": float(rng.choice([0.1, 0.5, 0.7, 0.9, 0.95, 1.0])),
            "min_p": float(rng.choice([0.0, 0.0, 0.05, 0.2])),
        }
        scores = processed(case)
        case["kept"] = [int(x) for x in np.flatnonzero(np.isfinite(scores))]
        wide = scores[case["kept"]].astype(np.float64)
        p = np.exp(wide - wide.max())
        case["probabilities"] = [float(f"{x:.9g}") for x in p / p.sum()]
        cases.append(case)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "cases": cases}, indent=None, separators=(",", ":"))
    (Path(__file__).parent / "sampling.json").write_text(text.replace('{"logits"', '\n{"logits"') + "\n")


if __name__ == "__main__":
    main()
