"""CTranslate2: a model converted into the temporary folder, at the best of one worker with all threads, one with one, and one-thread
workers that share the batch."""

import engine

COMPUTE = {"f32": "float32", "bf16": "bfloat16", "q8_0": "int8_float32", "int8": "int8_float32"}


class Tokens:
    """Stands for the tokenizer that the converter asks for: the token of id 7 is "t7"."""

    bos_token, eos_token, unk_token, pad_token = "t0", "t1", "t2", "t0"

    def __init__(self, size):
        self.size, self.special_tokens_map = size, {}

    def get_vocab(self):
        return {f"t{i}": i for i in range(self.size)}

    def convert_ids_to_tokens(self, ids):
        return f"t{ids}" if isinstance(ids, int) else [f"t{i}" for i in ids]


def converted(case):
    import json

    import transformers
    from ctranslate2.converters import TransformersConverter

    path = engine.shared(f"{case['model']}-ctranslate2")
    if not path.exists():
        transformers.BertConfig.position_embedding_type = "absolute"  # the converter reads what version 5 no longer sets
        size = json.loads((engine.folder(case) / "config.json").read_text())["vocab_size"]

        class Converter(TransformersConverter):
            def load_tokenizer(self, *args, **kwargs):
                return Tokens(size)

        with engine.making(path) as new:
            Converter(str(engine.folder(case))).convert(str(new))
    return str(path)


def setups():
    """(workers, threads of each)."""
    n = engine.threads()
    return [(1, 1)] if n == 1 else [(1, n), (1, 1), (n, 1)]


def options(case, cls):
    """(model, label, workers)"""
    import ctranslate2

    if case["model"] == "smollm2" or case["kind"] not in COMPUTE:
        return
    path = converted(case)
    for workers, count in setups():
        if workers > 1 and case.get("batch", 1) == 1:
            continue
        model = getattr(ctranslate2, cls)(path, compute_type=COMPUTE[case["kind"]], inter_threads=workers, intra_threads=count)
        yield model, f"{model.compute_type}, {workers} x {count} threads", workers


def names(rows):
    return [[f"t{i}" for i in row] for row in rows]


def numbers(rows):
    return [[int(t[1:]) for t in row] for row in rows]


def written(case, cls, call):
    """`call(model, prompts, the most that one worker takes) -> ids`."""
    rows = names(engine.prompts(case))
    found = []
    for model, how, workers in options(case, cls):
        size = -(-len(rows) // workers)
        found.append(engine.named(lambda model=model, size=size: call(model, rows, size), how))
    return engine.best(found) if found else None


def decode(case):
    length = {"max_length": engine.NEW, "min_length": engine.NEW, "include_prompt_in_result": False}

    def call(model, rows, size):
        return numbers(r.sequences[0] for r in model.generate_batch(rows, max_batch_size=size, beam_size=1, **length))

    return written(case, "Generator", call)


def prompt(case):
    ids = names([engine.prompt_ids(case["tokens"])])

    def call(model, rows, size):
        out = model.generate_batch(ids, max_length=1, min_length=1, beam_size=1, include_prompt_in_result=False)
        return numbers(out[0].sequences)[0]

    return written(case, "Generator", call)


def translate(case):
    length = {"max_decoding_length": engine.TRANSLATED, "min_decoding_length": engine.TRANSLATED}

    def call(model, rows, size):
        return numbers(r.hypotheses[0] for r in model.translate_batch(rows, max_batch_size=size, beam_size=1, **length))

    return written(case, "Translator", call)


def encode(case):
    import numpy as np

    def states(model):
        def run(ids, mask):
            rows = [row[:n].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]
            return np.array(model.forward_batch(rows).last_hidden_state)

        return run

    found = []
    for model, how, workers in options(case, "Encoder"):
        run = engine.encode_run(case, [states(model)] * workers, 32)
        found.append(engine.named(run, how if "tokens" in case else f"{how}, batches of 32"))
    return engine.best(found) if found else None
