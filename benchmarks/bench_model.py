"""Whole models: decoding, prompts, encoding, translation, training steps. Random weights where speed does not depend on them, the same
ones for each library; how each runs the first four is in its engine_<who>.py.

SmolLM2 is timed where its file is: `fastlm demo` puts it into the cache folder, or FASTLM_SMOLLM2 names it. FASTLM_MINILM names the
folder of all-MiniLM-L6-v2, FASTLM_IK_LLAMA that of ik_llama.cpp's programs.
"""

PROMPT, NEW, SOURCE, TRANSLATED = 32, 32, 64, 128  # as in engine.py
CASES = [
    {"model": "gpt-char", "task": "train", "batch": 12, "context": 64},
    {"model": "smollm2", "task": "decode", "kind": "q4_1", "batch": 1},
    {"model": "smollm2", "task": "decode", "kind": "q4_1", "batch": 8},
    {"model": "smollm2", "task": "prompt", "kind": "q4_1", "tokens": 512},
    *({"model": "gpt2", "task": "decode", "kind": kind, "batch": 1} for kind in ("f32", "bf16", "q8_0", "q4_0")),
    *({"model": "gpt2", "task": "decode", "kind": kind, "batch": 8} for kind in ("q8_0", "q4_0")),
    *({"model": "gpt2", "task": "prompt", "kind": kind, "tokens": 512} for kind in ("f32", "int8")),
    {"model": "gpt2", "task": "train", "batch": 4, "context": 256},
    {"model": "gpt2", "task": "train", "batch": 1, "context": 1024},
    {"model": "gpt-char-6x384", "task": "train", "batch": 12, "context": 256},
    {"model": "stories260k", "task": "decode", "kind": "f32", "batch": 1},
    *({"model": "all-minilm-l6-v2", "task": "encode", "kind": "f32", "batch": 256, "input": given} for given in ("ids", "text")),
    {"model": "all-minilm-l6-v2", "task": "encode", "kind": "int8", "batch": 256, "input": "ids"},
    *({"model": "bert-base-uncased", "task": "encode", "kind": kind, "batch": 8, "tokens": 128} for kind in ("f32", "int8")),
    *({"model": "t5-small", "task": "translate", "kind": kind, "batch": batch} for kind in ("f32", "int8") for batch in (1, 8)),
]
SIZES = {  # weights of a layer that make keys and values, its others, weights of the head, layers, width of attention
    "gpt-char": (2 * 128**2, 10 * 128**2, 65 * 128, 4, 128),
    "gpt-char-6x384": (2 * 384**2, 10 * 384**2, 65 * 384, 6, 384),
    "gpt2": (2 * 768**2, 10 * 768**2, 50257 * 768, 12, 768),
    "smollm2": (2 * 576 * 192, 2 * 576 * 576 + 3 * 576 * 1536, 49152 * 576, 30, 576),
    "stories260k": (2 * 64 * 32, 2 * 64 * 64 + 3 * 64 * 172, 512 * 64, 5, 64),
    "all-minilm-l6-v2": (2 * 384**2, 10 * 384**2, 0, 6, 384),
    "bert-base-uncased": (2 * 768**2, 10 * 768**2, 0, 12, 768),
    "t5-small": (2 * 512**2, 4 * 512**2 + 2 * 512 * 2048, 32128 * 512, 6, 512),  # of the decoder, without K and V of the source
}
BITS = {"f32": 32, "bf16": 16, "int8": 8, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5}  # a weight, its share of the scales included
HEAD_BITS = 8.5  # of a quantised model, at least


def CEILING(case):
    kind = case.get("kind", "f32")
    if case.get("task") == "encode" and kind == "f32":
        return "fast_gflops"
    return "gflops" if kind in ("f32", "bf16") else "int8_gops" if kind == "int8" else "int8_scaled_gops"


def name(case):
    """What the table shows and --case selects by: "gpt2-decode-q4_0-8"."""
    return "-".join(str(v) for v in case.values())


def tokens(case):
    """Of one call: those trained on, those read, or those written. A sentence's are known once it is made."""
    if case["task"] == "train":
        return case["batch"] * case["context"]
    if case["task"] == "prompt":
        return case["tokens"]
    if case["task"] == "encode":
        return sum(lengths(case))
    return case["batch"] * (TRANSLATED if case["task"] == "translate" else NEW)


def lengths(case):
    import engine

    return [len(row) for row in engine.encode_ids(case)]


def work(both, case):
    """Operations that are needed, products and attention; and the bytes of the weights as often as they must be read: where every bit
    is kept in 28 or 12, those."""
    keys, others, head, layers, width = SIZES[case["model"]]
    body = layers * (keys + others)
    if case["task"] == "train":
        return tokens(case) * (6 * (body + head) + 6 * layers * width * case["context"]), 12 * (body + head)
    bits = BITS[case["kind"]]
    if case["task"] == "decode" and case["model"] == "gpt2" and case["kind"] in ("f32", "bf16"):
        bits -= 4
    size = (body * bits + head * (bits if case["kind"] in ("f32", "bf16") else max(bits, HEAD_BITS))) / 8

    def read(n):  # a prompt: of its last layer and of the head the last position alone is wanted
        products = body * n - others * (n - 1) + head
        return 2 * products + 2 * (layers - 1) * width * n * n + 4 * width * n

    if case["task"] == "decode":
        attended = sum(range(PROMPT + 1, PROMPT + NEW))
        return case["batch"] * (read(PROMPT) + 2 * (body + head) * (NEW - 1) + 4 * layers * width * attended), size * NEW
    if case["task"] == "encode":
        rows = lengths(case)
        return 2 * body * sum(rows) + 4 * layers * width * sum(n * n for n in rows), size
    if case["task"] == "translate":  # attention itself, which is little, is left out
        encoder = 6 * (4 * 512 * 512 + 2 * 512 * 2048) + 12 * 512 * 512
        return 2 * case["batch"] * ((body + head) * TRANSLATED + encoder * SOURCE), size * TRANSLATED
    return read(case["tokens"]), size


# --- training: ours and torch's ---


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

    for _ in range(2 if compiled else 0):  # compiling is not timed
        run()
    return run
