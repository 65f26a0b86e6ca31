"""Whole models: decoding, prompts, training steps. Random weights where speed does not depend on them, the same ones for each library.

SmolLM2 is timed where its file is: `fastlm demo` puts it into the cache folder, or FASTLM_SMOLLM2 names it.
"""

import os
import tempfile
from pathlib import Path

PROMPT, NEW = 32, 32
CASES = [
    {"model": "gpt-char", "task": "train", "batch": 12, "context": 64},
    {"model": "smollm2", "task": "decode"},
    {"model": "smollm2", "task": "prompt", "tokens": 512},
    {"model": "gpt2", "task": "decode"},
    {"model": "gpt2", "task": "prompt", "tokens": 512},
    {"model": "gpt2", "task": "train", "batch": 4, "context": 256},
    {"model": "gpt2", "task": "train", "batch": 1, "context": 1024},
    {"model": "gpt-char-6x384", "task": "train", "batch": 12, "context": 256},
]
SIZES = {  # weights that multiply in a token (embedding tables count once: the tied head), layers, width
    "gpt-char": (4 * 12 * 128**2 + 65 * 128, 4, 128),
    "gpt-char-6x384": (6 * 12 * 384**2 + 65 * 384, 6, 384),
    "gpt2": (12 * 12 * 768**2 + 50257 * 768, 12, 768),
    "smollm2": (30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49152 * 576, 30, 576),
}


def tokens(case):
    """Of one call: those trained on, those read, or those written."""
    if case["task"] == "train":
        return case["batch"] * case["context"]
    return case.get("tokens", NEW)


def work(both, case):
    weights, layers, width = SIZES[case["model"]]
    count = tokens(case)
    if case["task"] == "train":
        return count * (6 * weights + 6 * layers * width * case["context"]), 4 * weights * 3
    bits = 5 if case["model"] == "smollm2" else 32  # Q4_1: 20 bytes for 32 weights
    if case["task"] == "decode":
        return 2 * weights * (PROMPT + NEW), weights * bits // 8 * NEW
    return 2 * weights * count, weights * bits // 8


def setup(case, who):
    return globals().get(f"{case['task']}_{who}", lambda case: None)(case)


def prompt_ids(case, count):
    return [(7 * i * i + 3 * i) % 1000 + 40 for i in range(count)]


def smollm2():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("FASTLM_CACHE") or Path(cache) / "fastlm"
    path = Path(os.environ.get("FASTLM_SMOLLM2") or Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return path if path.exists() else None


def shared_folder(case):
    """Where ours, which is prepared first, leaves its random weights for the peers."""
    return Path(tempfile.gettempdir()) / f"fastlm-bench-{os.getuid()}" / case["model"]


# --- fastlm ---


def lm_ours(case):
    import fastlm
    from fastlm import models

    if case["model"] == "smollm2":
        return fastlm.load(smollm2()) if smollm2() else None
    if not (shared_folder(case) / "config.json").exists():
        fastlm.LM(models.create(case["model"])).save(shared_folder(case))
    return fastlm.load(shared_folder(case))


def decode_ours(case):
    lm = lm_ours(case)
    return lm and (lambda: lm.generate_ids(prompt_ids(case, PROMPT), max_tokens=NEW))


def prompt_ours(case):
    lm = lm_ours(case)
    return lm and (lambda: lm.generate_ids(prompt_ids(case, case["tokens"]), max_tokens=1))


def train_config(case):
    from fastlm import models

    if case["model"] == "gpt-char-6x384":  # nanoGPT's character model
        return models.GPTConfig(vocab_size=65, context=256, d_model=384, n_layer=6, n_head=6, bias=False)
    return case["model"]


def train_ours(case):
    import numpy as np

    import fastlm
    from fastlm import models

    model = models.create(train_config(case))
    text = np.random.default_rng(0).integers(0, model.config.vocab_size, 100_000)
    steps = fastlm.train(model, text, steps=1 << 30, batch=case["batch"], context=case["context"])
    return lambda: next(steps).loss


# --- transformers and torch ---


def model_transformers(case):
    import torch
    from transformers import AutoModelForCausalLM

    if case["model"] == "smollm2":
        return None  # it would dequantise the file: another computation
    return AutoModelForCausalLM.from_pretrained(shared_folder(case), dtype=torch.float32).eval()


def decode_transformers(case):
    import torch

    model = model_transformers(case)
    if model is None:
        return None
    ids = torch.tensor([prompt_ids(case, PROMPT)])
    ones = torch.ones_like(ids)

    def run():
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=ones, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True
            )
        return out[0, PROMPT:]

    return run


def prompt_transformers(case):
    import torch

    model = model_transformers(case)
    if model is None:
        return None
    ids = torch.tensor([prompt_ids(case, case["tokens"])])

    def run():
        with torch.inference_mode():
            return model(ids, logits_to_keep=1).logits[0, -1].argmax()[None]

    return run


def train_torch_compile(case):
    """The same, compiled; the optimiser is torch's fused AdamW."""
    return train_torch(case, compiled=True)


def train_torch(case, compiled=False):
    """A step of nanoGPT's model.py and train.py (no dropout, no bias, scaled_dot_product_attention, AdamW with clipping), in eager mode."""
    import math

    import torch
    import torch.nn.functional as F
    from torch import nn

    V, C, L, H = {"gpt-char": (65, 128, 4, 4), "gpt-char-6x384": (65, 384, 6, 6), "gpt2": (50257, 768, 12, 12)}[case["model"]]
    bias = case["model"] == "gpt2"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
            self.qkv, self.out = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)
            self.up, self.down = nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(case["context"], C)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(C, bias=bias)
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if name.endswith(("out.weight", "down.weight")) else 0.02)

        def forward(self, ids, targets):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(F.linear(self.norm(x), self.tokens.weight).view(-1, V), targets.view(-1))

    model = Model()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model
    text = torch.randint(V, (100_000,))

    def run():
        starts = torch.randint(len(text) - case["context"] - 1, (case["batch"],))
        cut = torch.stack([text[i : i + case["context"] + 1] for i in starts])
        loss = forward(cut[:, :-1], cut[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


# --- llama.cpp ---


def model_llama_cpp(case):
    from llama_cpp import Llama

    if case["model"] != "smollm2" or smollm2() is None:
        return None
    threads = int(os.environ["FASTLM_NUM_THREADS"])
    return Llama(str(smollm2()), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def decode_llama_cpp(case):
    """llama_decode and argmax: its Python wrapper's own loop costs more than the library."""
    return _llama(case, PROMPT, NEW)


def prompt_llama_cpp(case):
    return _llama(case, case["tokens"], 1)


def _llama(case, read, write):
    import ctypes

    import llama_cpp as lib
    import numpy as np

    llm = model_llama_cpp(case)
    if llm is None:
        return None
    context, V = llm.ctx, llm.n_vocab()

    def decode(ids):
        array = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(
            np.ctypeslib.as_array(ctypes.cast(lib.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float)), (V,)).argmax()
        )

    def run():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        out = [decode(prompt_ids(case, read))]
        while len(out) < write:
            out.append(decode(out[-1:]))
        return np.array(out)

    run.keeps = llm  # else its memory goes when this function returns
    return run
