"""transformers' generate, and its forward pass for prompts."""

import engine


def options(case):
    """(label, dtype) of what may be best at the row's precision or above."""
    import torch

    return {"f32": torch.float32, "bf16": torch.bfloat16}.get(case["kind"]) if case["model"] != "smollm2" else None


def generate(case, cls, new):
    import torch
    import transformers

    dtype = options(case)
    if dtype is None:
        return None
    model = getattr(transformers, cls).from_pretrained(engine.folder(case), dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(engine.prompts(case))
    ones = torch.ones_like(ids)

    def run():
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=ones, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=True
            )
        return out[:, -new:]

    return engine.named(run, f"{case['kind']}, {engine.threads()} threads")


def decode(case):
    return generate(case, "AutoModelForCausalLM", engine.NEW)


def translate(case):
    return generate(case, "AutoModelForSeq2SeqLM", engine.TRANSLATED)


def prompt(case):
    import torch
    import transformers

    dtype = options(case)
    if dtype is None:
        return None
    model = transformers.AutoModelForCausalLM.from_pretrained(engine.folder(case), dtype=dtype).eval()
    ids = torch.tensor([engine.prompt_ids(case["tokens"])])

    def run():
        with torch.inference_mode():
            return model(ids, logits_to_keep=1).logits[0, -1].argmax()[None]

    return engine.named(run, f"{case['kind']}, {engine.threads()} threads")
