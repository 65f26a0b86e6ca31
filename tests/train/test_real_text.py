"""What the objectives reach on real text and on the tasks of the papers, in minutes: `make learn`. Each prints what it reached.

The short versions, on a small language, are in test_learning.py.
"""

from __future__ import annotations

import time
from argparse import Namespace

import numpy as np
import pytest

import fastlm
from fastlm import data, models
from fastlm.cli.demo import shakespeare
from fastlm.cli.objectives import guess
from fastlm.models.bert import BertConfig
from fastlm.models.t5 import T5Config
from fastlm.models.xlnet import XLNetConfig
from fastlm.train import Distilled, evaluate, student_of, teacher, train

pytestmark = pytest.mark.learning
CONTEXT = 32
SIZES = {"d_model": 128, "n_layer": 2, "n_head": 4, "d_ff": 512}


@pytest.fixture(scope="module")
def text():
    """Shakespeare in pieces learnt from him: tokenizer, corpus."""
    whole = shakespeare()
    tokenizer = fastlm.Tokenizer.train_bpe([whole], 512).with_special(
        {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    )
    ids = np.array(tokenizer.encode(whole, special_tokens=False))
    cut = len(ids) * 9 // 10
    return tokenizer, data.Corpus(ids[:cut], ids[cut:], tokenizer.vocab_size)


def learn(model, corpus, objective, steps, batch=64, lr=2e-3, context=CONTEXT):
    started = time.perf_counter()
    for step in train(
        model, corpus, objective=objective, steps=steps, batch=batch, context=context, lr=lr, warmup=steps // 20,
        weight_decay=0.01, betas=(0.9, 0.98),
        eval_every=steps // 5, eval_batches=20,
    ):  # fmt: skip
        if step.validation_loss is not None:
            print(f"  step {step.step}: held-out {step.validation_loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return evaluate(model, corpus, batch, context, objective=objective)


@pytest.fixture(scope="module")
def bert(text):
    """A BERT that has learnt masked words on Shakespeare, its held-out loss, and that of guessing by frequency."""
    tokenizer, corpus = text
    objective = data.Masked(data.Vocabulary.of(tokenizer), whole_word=True)
    model = models.create(BertConfig(tokenizer.vocab_size, CONTEXT, **SIZES, head="masked_lm"), 1)
    guessed = guess(model, corpus, objective, Namespace(batch=64, context=CONTEXT, seed=0))
    print("\nmasked words, BERT")
    return model, learn(model, corpus, objective, 1500), guessed


def found(model, objective, tokens):
    """Share of hidden tokens found, over held-out text."""
    right = count = 0
    for b in data.windows(tokens, 32, CONTEXT, None, objective):
        asked = b.targets != -100
        right += int((model.logits(b.ids, b.mask).argmax(-1) == b.targets)[asked].sum())
        count += int(asked.sum())
    return right / count


def test_bert_learns_masked_words(text, bert):
    tokenizer, corpus = text
    model, held, guessed = bert
    objective = data.Masked(data.Vocabulary.of(tokenizer), whole_word=True)
    share = found(model, objective, corpus.validation)
    most = np.bincount(corpus.train).max() / len(corpus.train)
    print(f"masked words: loss {held:.3f}, by frequency {guessed:.3f}; {share:.1%} found, by the commonest token {most:.1%}")
    assert held < guessed - 0.8
    assert share > most + 0.1


def test_student_comes_closer_to_its_teacher(text, bert):
    """Half of the layers. Its divergence from the teacher falls by half, and its own loss comes to within 0.3 of the teacher's."""
    tokenizer, corpus = text
    mentor, held, _ = bert
    masked = data.Masked(data.Vocabulary.of(tokenizer), whole_word=True)
    objective = data.Distillation(masked, teacher(mentor))
    model = Distilled(student_of(mentor, (0,)))
    divergence = Distilled(model.model, ce=1, mlm=0, cos=0)
    before = evaluate(divergence, corpus, 32, CONTEXT, 20, objective)
    print("\ndistillation, DistilBERT")
    learn(model, corpus, objective, 500)
    after, own = (
        evaluate(divergence, corpus, 32, CONTEXT, 20, objective),
        evaluate(model.model, corpus, 32, CONTEXT, objective=masked),
    )
    print(f"divergence from the teacher {before:.3f} -> {after:.3f}; masked loss {own:.3f}, the teacher's {held:.3f}")
    assert after < 0.5 * before
    assert own < held + 0.3


def test_a_pretrained_encoder_learns_a_task_better(text, bert):
    """Whether a passage that pre-training did not see is in its own order or shuffled, by 400 labelled passages: the pre-trained model
    against one with first weights."""
    tokenizer, corpus = text
    rng = np.random.default_rng(0)
    v = data.Vocabulary.of(tokenizer)
    pieces = corpus.validation[: len(corpus.validation) // 30 * 30].reshape(-1, 30)
    labels = rng.integers(0, 2, len(pieces))
    rows = [[v.cls, *(rng.permutation(piece) if label else piece), v.sep] for piece, label in zip(pieces, labels, strict=True)]
    few, rest = data.Labelled(rows[:400], labels[:400]), data.Labelled(rows[400:], labels[400:]).batch(range(len(rows) - 400))
    right = {}
    for name, body in (("pre-trained", bert[0]), ("first weights", models.create(bert[0].config, 7))):
        model = models.with_head(body, "sequence_classification", labels=("as written", "shuffled"), seed=3)
        for _ in train(model, few, steps=250, batch=16, lr=5e-4, warmup=25, context=CONTEXT, weight_decay=0.01):
            pass
        right[name] = float(np.mean(model.logits(rest.ids).argmax(-1) == rest.targets))
    print("\nfine-tuning by 400 examples, right of the others: " + ", ".join(f"{k} {x:.1%}" for k, x in right.items()))
    assert right["pre-trained"] > 0.65 > right["first weights"] + 0.1


def test_xlnet_learns_permutations(text):
    tokenizer, corpus = text
    objective = data.Permutation(data.Vocabulary.of(tokenizer))
    model = models.create(XLNetConfig(tokenizer.vocab_size, **SIZES), 1)
    guessed = guess(model, corpus, objective, Namespace(batch=64, context=CONTEXT, seed=0))
    print("\npermutations, XLNet")
    held = learn(model, corpus, objective, 800)
    print(f"permutations: loss {held:.3f}, by frequency {guessed:.3f}")
    assert held < guessed - 0.8


def test_t5_learns_spans(text):
    _, corpus = text
    tokenizer = fastlm.Tokenizer.train_bpe([shakespeare()], 512).with_special(
        {"pad": "<pad>", "eos": "</s>"}, [f"<extra_id_{i}>" for i in reversed(range(20))]
    )
    corpus = data.Corpus(corpus.train, corpus.validation, tokenizer.vocab_size)
    objective = data.SpanCorruption(data.Vocabulary.of(tokenizer))
    config = T5Config(tokenizer.vocab_size, **SIZES, n_encoder_layer=2, head_dim=32, start=tokenizer.pad_id)
    model = models.create(config, 1)
    guessed = guess(model, corpus, objective, Namespace(batch=64, context=CONTEXT, seed=0))
    print("\nspans, T5")
    held = learn(model, corpus, objective, 800)
    print(f"spans: loss {held:.3f}, by frequency {guessed:.3f}")
    assert held < guessed - 1.2


@pytest.mark.parametrize("backwards", [False, True], ids=["copy", "reverse"])
def test_t5_copies_and_reverses(backwards):
    """Ten symbols, from the training loop with a function that makes batches: 95 of 100 unseen sequences are right."""
    config = T5Config(vocab_size=16, d_model=64, d_ff=128, n_layer=2, n_encoder_layer=2, n_head=4, head_dim=16)
    model = models.create(config, 1)

    def batches(n):
        source = np.random.Generator(np.random.Philox(key=[5, n])).integers(2, 16, (32, 10)).astype(np.int32)
        targets = np.concatenate([source[:, :: -1 if backwards else 1], np.ones((32, 1), np.int32)], 1)
        return data.SourceBatch(source, np.concatenate([np.zeros((32, 1), np.int32), targets[:, :-1]], 1), targets)

    for step in train(
        model, batches, steps=2000, batch=32, context=11, lr=3e-3, min_lr=0.0, warmup=50, weight_decay=0.0, betas=(0.9, 0.99)
    ):
        if step.step % 500 == 0:
            print(f"  step {step.step}: loss {step.loss:.4f}", flush=True)
    unseen = np.random.default_rng(1).integers(2, 16, (100, 10)).tolist()
    out = fastlm.LM(model.freeze()).generate_ids(unseen, max_tokens=11, eos=1)
    right = sum(got == [*(row[::-1] if backwards else row), 1] for got, row in zip(out, unseen, strict=True))
    print(f"{'reverse' if backwards else 'copy'}: {right} of 100")
    assert right >= 95
