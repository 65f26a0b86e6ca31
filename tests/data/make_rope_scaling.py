"""Writes rope_scaling.npz: rotary frequencies and attention factors as Hugging Face transformers computes them.

Needs torch and transformers (Apache-2.0); the tests need only the file. Run from this folder: python make_rope_scaling.py
"""

import json
from pathlib import Path

import numpy as np
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CASES = {
    "linear": {"dim": 64, "n_positions": 64, "base": 10000.0, "scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {
        "dim": 128,
        "n_positions": 5000,
        "base": 10000.0,
        "scaling": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 2048},
    },
    "dynamic_short": {
        "dim": 128,
        "n_positions": 100,
        "base": 10000.0,
        "scaling": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 2048},
    },
    "llama3": {
        "dim": 64,
        "n_positions": 64,
        "base": 500000.0,
        "scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {
        "dim": 128,
        "n_positions": 64,
        "base": 10000.0,
        "scaling": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    },
    "yarn_mscale": {
        "dim": 64,
        "n_positions": 64,
        "base": 10000.0,
        "scaling": {
            "rope_type": "yarn",
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_fast": 24,
            "beta_slow": 2,
            "original_max_position_embeddings": 4096,
        },
    },
    "yarn_whole": {
        "dim": 64,
        "n_positions": 64,
        "base": 150000.0,
        "scaling": {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
    },
    "yarn_given": {
        "dim": 64,
        "n_positions": 64,
        "base": 10000.0,
        "scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25, "original_max_position_embeddings": 2048},
    },
}

arrays: dict[str, np.ndarray] = {}
for name, case in CASES.items():
    parameters = {**case["scaling"], "rope_theta": case["base"]}
    longest = parameters.pop("max_position_embeddings", 131072)
    config = LlamaConfig(
        hidden_size=case["dim"] * 4, num_attention_heads=4, max_position_embeddings=longest, rope_parameters=parameters
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=case["n_positions"])
    arrays[name] = frequencies.double().numpy()
    arrays[name + "/factor"] = np.float64(factor)
arrays["cases"] = np.array(json.dumps(CASES))
arrays["made_by"] = np.array(f"transformers {transformers.__version__}")
np.savez_compressed(Path(__file__).parent / "rope_scaling.npz", **arrays)
