"""The table that `make bench` measures: the rows, and how much faster than its peers fastlm means to be in each.

A row is an operation's case in one pass, or a model's. A bar is a ratio to the fastest of some peers in the same run, or the most of their
memory. Rows without a bar are there to be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """`ratio` times as fast as the fastest of `peers` (all, where empty); with `memory`: at most `ratio` of the least that they need."""

    ratio: float
    peers: tuple[str, ...] = ()
    memory: bool = False

    def __str__(self) -> str:
        whom = " or ".join(self.peers)
        if self.memory:
            return f"memory <= {self.ratio:g}x" + (f" of {whom}" if whom else "")
        return f"{self.ratio:g}x" + (f" {whom}" if whom else "")


@dataclass(frozen=True)
class Target:
    op: str
    case: str  # as `harness.label` writes it
    backward: bool
    bars: tuple[Bar, ...] = ()

    @property
    def key(self) -> tuple[str, str, bool]:
        return self.op, self.case, self.backward


TORCH = ("torch", "torch_compile")
OTHERS = ("ctranslate2", "onnxruntime", "openvino")


def _table() -> Iterator[Target]:
    def row(op: str, case: str, *bars: float | Bar, backward: bool = False) -> Target:
        return Target(op, case, backward, tuple(b if isinstance(b, Bar) else Bar(b) for b in bars))

    def both(op: str, case: str, forward: float | None, backward: float | None) -> Iterator[Target]:
        for passes, ratio in ((False, forward), (True, backward)):
            yield row(op, case, *(() if ratio is None else (ratio,)), backward=passes)

    # products
    for case in ("512x512,512x512", "1024x1024,1024x1024", "2048x2048,2048x2048", "1024x768,768x2304"):
        yield from both("matmul", case, 1.0, 1.0)
    for case in ("1024x768,out=2304", "1024x768,out=3072,activation=gelu", "1024x3072,out=768,residual=True"):
        yield from both("linear", case, 1.0, 1.0)
    yield row("linear", "1024x768,out=50257,bias=False", Bar(1.3, TORCH))
    yield row("matmul", "8x768,768x3072,cold=b", 2.0)
    yield row("matmul", "64x768,768x3072,cold=b", Bar(1.3, TORCH))
    yield row("linear", "8x768,out=3072,cold=weight", 2.0)
    yield row("linear", "64x768,out=3072,cold=weight", 1.3)
    yield row("linear", "1x768,out=3072,weight=bfloat16,cold=weight", 1.7)
    # attention
    for case, ratio in (
        ("1x128x128x12x12x64,causal=True", 2.5),
        ("4x512x512x12x12x64,causal=True", 1.4),
        ("1x1024x1024x12x12x64,causal=True", 1.4),
        ("1x2048x2048x12x12x64,causal=True", 1.4),
        ("1x2048x2048x12x12x64", 1.4),
    ):
        yield from both("attention", case, ratio, ratio)
    for keys in (1024, 4096):
        for batch, ratio in ((1, 2.0), (8, 2.5)):
            yield row("attention", f"{batch}x1x{keys}x32x8x128,forward_only=True", ratio)
    # norms, losses, sampling
    yield from both("layer_norm", "8192x768", 1.1, 1.5)
    yield from both("rms_norm", "8192x768", 4.0, 6.0)
    yield from both("rms_norm", "1024x4096", 4.0, 6.0)
    yield from both("cross_entropy", "1024x50257", 1.6, 1.6)
    for passes in (False, True):
        yield row("linear_cross_entropy", "1024x768,V=50257", 1.3, Bar(0.2, memory=True), backward=passes)
    for size in (50257, 128256):
        yield row("sampling", f"1x{size},top_k=50,top_p=0.9,temperature=0.8", Bar(6, ("llama_cpp",)), Bar(150, ("transformers",)))
        yield row("sampling", f"1x{size},top_p=0.9,spread=1.0", Bar(30, ("llama_cpp",)), Bar(60, ("transformers",)))
    # experts
    for case in ("R=4096,E=8,C=512,F=1792", "R=4096,E=64,C=512,F=1024"):
        yield from both("grouped", case, 0.85, 0.85)
    # decoding and prompts
    for kind, ratio in (("f32", 1.25), ("bf16", 1.6), ("q8_0", 1.3), ("q4_0", 1.5)):
        yield row("model", f"gpt2-decode-{kind}-1", ratio)
    yield row("model", "gpt2-decode-q8_0-8", 1.8)
    yield row("model", "gpt2-decode-q4_0-8", 1.8)
    yield row("model", "gpt2-prompt-f32-512", 1.4)
    yield row("model", "gpt2-prompt-int8-512", 1.5)
    yield row("model", "smollm2-decode-q4_1-1", 1.2)
    yield row("model", "smollm2-prompt-q4_1-512", 1.4)
    yield row("model", "smollm2-decode-q4_1-8", 2.5)
    yield row("model", "stories260k-decode-f32-1", 2.0)
    # training
    for case, ratio in (
        ("gpt2-train-4-256", 1.15),
        ("gpt2-train-1-1024", 1.2),
        ("gpt-char-6x384-train-12-256", 1.3),
        ("gpt-char-train-12-64", 2.0),
    ):
        yield row("model", case, ratio, Bar(0.75, memory=True))
    # encoders, translation
    yield row("model", "all-minilm-l6-v2-encode-f32-256-ids", Bar(1.5, TORCH), Bar(1.2, OTHERS))
    yield row("model", "all-minilm-l6-v2-encode-int8-256-ids", 1.2)
    yield row("model", "bert-base-uncased-encode-f32-8-128", 1.1)
    yield row("model", "bert-base-uncased-encode-int8-8-128", 1.3)
    for kind in ("f32", "int8"):
        for batch in (1, 8):
            yield row("model", f"t5-small-translate-{kind}-{batch}", 1.2)


TABLE: tuple[Target, ...] = tuple(_table())
BY_KEY = {t.key: t for t in TABLE}
