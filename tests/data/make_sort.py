"""Writes tests/data/gpt-nano-sort from the files of bbycroft/llm-viz: `python tests/data/make_sort.py FOLDER`.

FOLDER holds gpt-nano-sort-model.json, gpt-nano-sort-t0-partials.json and LICENSE (MIT). The weights become a Hugging Face GPT-2
folder: minGPT's linear layers (out, in) are transposed to Conv1D's (in, out), the causal masks are left out. The intermediate
activations of one batch become partials.npz.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

source, target = Path(sys.argv[1]), Path(__file__).parent / "gpt-nano-sort"
target.mkdir(exist_ok=True)


def arrays(name):
    entries = json.loads((source / name).read_text())
    config = entries.pop("config")
    return config, {k: np.frombuffer(base64.b64decode(e["data"]), "<f4").reshape(e["shape"]) for k, e in entries.items()}


config, weights = arrays("gpt-nano-sort-model.json")
linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
tensors = {k: np.ascontiguousarray(v.T if k.endswith(linear) else v) for k, v in weights.items() if not k.endswith(".attn.bias")}
save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
raw = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": False}
raw |= {"n_positions": config["block_size"]} | {k: config[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
(target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
_, partials = arrays("gpt-nano-sort-t0-partials.json")
np.savez_compressed(target / "partials.npz", **partials)
shutil.copyfile(source / "LICENSE", target / "LICENSE")
