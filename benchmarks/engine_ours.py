"""fastlm. Random weights are made here, first, for all."""

import engine


def stories260k():
    """The shape of the smallest of llama2.c's models."""
    from fastlm import models

    sizes = {"d_model": 64, "n_layer": 5, "n_head": 8, "n_kv_head": 4, "head_dim": 8, "d_ff": 172}
    return models.LlamaConfig(vocab_size=512, context=512, **sizes, tied=True)


SHAPES = {"stories260k": stories260k}  # what is no preset


def load(case):
    """The language model in the case's precision, quantised weights with 8-bit activations as in the other engines, float32 and bfloat16
    for decoding in fewer bits without loss; None where its file is absent."""
    import fastlm
    from fastlm import models

    kind = case["kind"]
    if case["model"] == "smollm2":
        if engine.smollm2() is None:
            return None
        lm = fastlm.load(engine.smollm2())
        lm.activations = "int8"
        return lm
    where = engine.folder(case)
    if not (where / "config.json").exists():
        with engine.making(where) as new:
            fastlm.LM(models.create(SHAPES.get(case["model"], lambda: case["model"])())).save(new)
    lm = fastlm.load(where, "bfloat16" if kind == "bf16" else "float32")
    if kind in ("f32", "bf16"):
        return lm.quantize("LOSSLESS") if packs(case) else lm
    return lm.quantize("Q8_ROW" if kind == "int8" else kind.upper(), activations="int8")


def packs(case):
    """Whether the weights keep their bits in fewer: what decoding with one sequence is bound by."""
    return case["task"] == "decode" and case["kind"] in ("f32", "bf16") and case["model"] not in SHAPES


def label(case):
    how = {"f32": "f32", "bf16": "bf16", "int8": "q8_row x int8"}.get(case["kind"], f"{case['kind']} x int8")
    how += ", lossless" if packs(case) else ""
    return f"{how}, {engine.threads()} threads"


def decode(case):
    lm = load(case)
    if lm is None:
        return None
    prompts = engine.prompts(case)
    return engine.named(lambda: lm.generate_ids(prompts, max_tokens=engine.NEW), label(case))


def prompt(case):
    lm = load(case)
    if lm is None:
        return None
    ids = engine.prompt_ids(case["tokens"])
    return engine.named(lambda: lm.generate_ids(ids, max_tokens=1), label(case))


def translate(case):
    lm = load(case)
    if lm is None:
        return None
    sources = engine.prompts(case)
    return engine.named(lambda: lm.generate_ids(sources, max_tokens=engine.TRANSLATED), label(case))


def encode(case):
    import numpy as np

    lm = load(case)
    if lm is None:
        return None
    if "tokens" in case:
        ids = np.array(engine.encode_ids(case), np.int32)
        return engine.named(lambda: lm.model.states(ids), label(case))
    if case.get("input") == "text":
        if lm.tokenizer is None:
            return None
        given = engine.sentences(case["batch"])
    else:
        given = engine.encode_ids(case)
    return engine.named(lambda: lm.embed(given), label(case))
