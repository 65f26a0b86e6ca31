"""What `fastlm train --objective` knows: which models learn by it, the special tokens that it needs, and what it says at the end."""

from __future__ import annotations

import argparse
import math
from itertools import islice
from typing import Any

import numpy as np

from fastlm.data import Corpus, Masked, Permutation, Replaced, SentencePairs, SpanCorruption, Vocabulary, windows
from fastlm.data.objectives import IGNORED
from fastlm.lm import LM
from fastlm.models import GPTConfig, LlamaConfig, create
from fastlm.models.albert import AlbertConfig
from fastlm.models.bert import BertConfig
from fastlm.models.electra import ElectraConfig
from fastlm.models.t5 import T5Config
from fastlm.models.xlnet import XLNetConfig
from fastlm.tokenizers import Tokenizer
from fastlm.train import Electra
from fastlm.train.sources import source

# Objective -> the models that learn by it, the usual one first.
MODELS = {
    "causal": ("gpt2", "llama"),
    "masked": ("bert", "albert"),
    "next-sentence": ("bert",),
    "sentence-order": ("albert",),
    "replaced": ("electra",),
    "spans": ("t5",),
    "permutation": ("xlnet",),
}
MASKED = ("masked", "next-sentence", "sentence-order")  # that hide tokens, by data.Masked
NAMES = tuple(dict.fromkeys(name for names in MODELS.values() for name in names))


def check(arguments: argparse.Namespace) -> None:
    """Settles the model and the size of the vocabulary; ValueError where the model does not learn by the objective, and for options
    that would do nothing (a run that is gone on with had them settled)."""
    able = MODELS[arguments.objective]
    arguments.model = arguments.model or able[0]
    if arguments.model not in able:
        raise ValueError(f"--model must be {' or '.join(able)} for --objective {arguments.objective}, got {arguments.model}")
    if not arguments.resume:
        if arguments.objective not in MASKED and (arguments.whole_word or arguments.copies is not None):
            option = "--whole-word" if arguments.whole_word else "--copies"
            raise ValueError(f"{option} is for --objective {', '.join(MASKED)}, got {arguments.objective}: leave it out")
        if arguments.tokenizer == "char" and arguments.vocab_size is not None:
            raise ValueError("--vocab-size is for --tokenizer bpe, got char, whose tokens are the text's characters: leave it out")
    arguments.vocab_size = arguments.vocab_size or 2048


def tokenizer(text: str, arguments: argparse.Namespace) -> Tokenizer:
    """Learnt from the text, with the special tokens that the objective needs behind it."""
    made = Tokenizer.characters(text) if arguments.tokenizer == "char" else Tokenizer.train_bpe([text], arguments.vocab_size)
    if arguments.objective == "causal":
        return made
    if arguments.objective == "spans":
        count = max(10, arguments.context // 8)  # a context of T has about T / 18 spans
        return made.with_special({"pad": "<pad>", "eos": "</s>"}, [f"<extra_id_{i}>" for i in reversed(range(count))])
    return made.with_special({"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"})


def objective(tokenizer: Tokenizer, arguments: argparse.Namespace) -> Any:
    """None for the next token."""
    kind = arguments.objective
    if kind == "causal":
        return None
    vocabulary = Vocabulary.of(tokenizer)
    if kind == "spans":
        return SpanCorruption(vocabulary)
    if kind == "permutation":
        return Permutation(vocabulary)
    if kind == "replaced":
        return Replaced.of(vocabulary)
    masked = Masked(vocabulary, whole_word=arguments.whole_word, copies=arguments.copies)
    if kind == "masked":
        return masked
    ends = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).endswith("\n")]
    if not ends:
        raise ValueError(f"--objective {kind} takes lines for sentences: the text has no line breaks")
    return SentencePairs(masked, "next" if kind == "next-sentence" else "order", ends=tuple(ends))


def model(arguments: argparse.Namespace, vocab_size: int) -> Any:
    """The model that the options describe, with its first weights; of the pair that --objective replaced trains, see Electra."""
    C, H, context, seed = arguments.width, arguments.heads, arguments.context, arguments.seed
    if C % H:
        raise ValueError(f"--width must be a multiple of --heads, got {C} and {H}")
    sizes = {"vocab_size": vocab_size, "d_model": C, "n_layer": arguments.layers, "n_head": H}
    feed = {"d_ff": 4 * C}
    name = arguments.model
    if name == "gpt2":
        return create(GPTConfig(**sizes, context=context, tied=True, bias=False), seed)
    if name == "llama":
        if C // H % 2:
            raise ValueError(f"--width / --heads must be even for rotary positions, got {C // H}")
        hidden = -(-8 * C // 3 // 32) * 32  # two thirds of 4 C, since there are three matrices
        return create(LlamaConfig(**sizes, context=context, tied=True, d_ff=hidden, n_kv_head=H, head_dim=C // H), seed)
    if name == "t5":
        return create(T5Config(**sizes, **feed, n_encoder_layer=arguments.layers, head_dim=C // H), seed)
    if name == "xlnet":
        return create(XLNetConfig(**sizes, **feed), seed)
    head = "masked_lm" if arguments.objective == "masked" else "pretraining"
    if name == "bert":
        return create(BertConfig(**sizes, **feed, context=context, head=head), seed)
    if name == "albert":
        return create(AlbertConfig(**sizes, **feed, context=context, d_embedding=min(C, 128), head=head), seed)
    small = dict(sizes, d_model=C // 4, d_ff=C) if C // 4 % H == 0 and C >= 4 * H else {**sizes, **feed}
    discriminator = create(ElectraConfig(**sizes, **feed, context=context, d_embedding=C, head="replaced_token"), seed)
    generator = create(ElectraConfig(**small, context=context, d_embedding=C, head="masked_lm"), seed + 1)
    generator.embeddings = discriminator.embeddings  # shared, as in the paper
    return Electra(discriminator, generator)


def holds_out(model: Any, corpus: Corpus, objective: Any, arguments: argparse.Namespace) -> bool:
    """Whether a row can be made of the held-out text."""
    return source(model, corpus, objective, arguments.batch, arguments.context, arguments.seed).held_out is not None


def blind(model: Any, corpus: Corpus, objective: Any) -> float:
    """The loss of taking every answer for as likely as any other."""
    tokens = math.log(corpus.vocab_size)
    if isinstance(objective, Replaced):  # and of two, whether a token was replaced
        return tokens + float(model.weight) * math.log(2)
    return tokens + (math.log(2) if isinstance(objective, SentencePairs) else 0.0)


def guess(model: Any, corpus: Corpus, objective: Any, arguments: argparse.Namespace) -> float:
    """The loss of guessing what is asked by its frequency, over 20 batches; of two answers that are as frequent, ln 2."""
    usable = corpus.validation if holds_out(model, corpus, objective, arguments) else corpus.train
    train, held = (Corpus(part, part, corpus.vocab_size) for part in (corpus.train, usable))
    counts = np.ones(corpus.vocab_size)
    found, extra = [], 0.0
    for part in (train, held):
        batches = source(model, part, objective, arguments.batch, arguments.context, arguments.seed, 20).held_out
        assert batches is not None
        targets = [b.targets for b in islice(batches(), 20)]
        extra = math.log(2) if isinstance(targets[0], tuple) else 0.0
        if isinstance(objective, Replaced):  # and whether a token was replaced, by how many are
            p = objective.masked.rate
            extra = -model.weight * (p * math.log(p) + (1 - p) * math.log(1 - p))
        found = [t[t != IGNORED] for t in (t[0] if isinstance(t, tuple) else t for t in targets)]
        if part is train:
            counts += np.bincount(np.concatenate(found), minlength=len(counts))
    return float(-np.log(counts[np.concatenate(found)] / counts.sum()).mean()) + extra


def show(lm: LM, corpus: Corpus, objective: Any, arguments: argparse.Namespace) -> None:
    """A held-out passage with what was hidden in it and what the model puts there; how often it is right."""
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    masked = getattr(objective, "masked", objective)
    text = corpus.validation if len(corpus.validation) >= masked.window(arguments.context) else corpus.train
    if isinstance(objective, SpanCorruption):
        batch = next(windows(text, 1, arguments.context, 1, objective))
        made = lm.generate_ids(batch.source_ids.tolist(), max_tokens=batch.targets.shape[1], eos=tokenizer.eos_id)[0]
        print(f"\nRead:\n{tokenizer.decode(batch.source_ids[0], special_tokens=True)}")
        print(f"\nWritten:\n{tokenizer.decode(made, special_tokens=True)}")
        print(f"\nWas:\n{tokenizer.decode(batch.targets[0], special_tokens=True)}")
        return
    if isinstance(objective, Replaced) or not isinstance(masked, Masked):
        return
    right = count = 0
    for batch in windows(text, arguments.batch, arguments.context, 20, masked):
        asked = batch.targets != IGNORED
        chosen = lm.logits(batch.ids, mask=batch.mask).argmax(-1)
        right, count = right + int((chosen == batch.targets)[asked].sum()), count + int(asked.sum())
    name = "held-out text" if text is corpus.validation else "text"
    print(f"\nOf {count:,} hidden tokens of the {name} {right / count:.1%} are found. One passage, each as (hidden|found):")
    row = next(windows(text, 1, arguments.context, 1, masked))
    found = lm.logits(row.ids, mask=row.mask).argmax(-1)[0]
    pieces: list[str] = []
    plain: list[int] = []
    for i, (token, target) in enumerate(zip(row.ids[0], row.targets[0], strict=True)):
        if target != IGNORED:
            pieces += [tokenizer.decode(plain), f"({tokenizer.decode([target])}|{tokenizer.decode([found[i]])})"]
            plain = []
        else:
            plain.append(int(token))
    print("".join([*pieces, tokenizer.decode(plain)]))
