"""Every objective through the training loop: fits, learns, evaluates on what is held out, goes on exactly where it stopped."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

import fastlm
from fastlm import data, hub, models
from fastlm.cli.objectives import guess
from fastlm.models.albert import AlbertConfig
from fastlm.models.bert import Bert, BertConfig
from fastlm.models.electra import ElectraConfig
from fastlm.models.heads import MaskedLM, NextSentence, QuestionAnswering
from fastlm.models.t5 import T5Config
from fastlm.models.xlnet import XLNetConfig
from fastlm.train import Distilled, Electra, evaluate, sources, student_of, teacher, train

V = 40
VOCABULARY = data.Vocabulary(V, pad=0, cls=1, sep=2, mask=3, eos=4, first_sentinel=39, sentinels=6)


def corpus(n=4000, seed=0):
    """A text in which the next token is one of two, and 5 ends sentences, twice in a row documents."""
    rng = np.random.default_rng(seed)
    tokens = [6]
    for u in rng.random(n):
        tokens.append(5 if u < 0.12 else 6 + (tokens[-1] * 7 + (u < 0.56)) % 27)
    whole = np.array(tokens, np.uint16)
    return data.Corpus(whole[: n * 9 // 10], whole[n * 9 // 10 :], V)


CORPUS = corpus()
SMALL = {"vocab_size": V, "d_model": 24, "n_layer": 2, "n_head": 2, "d_ff": 48}
ENCODER = {**SMALL, "context": 24}
MASKED = data.Masked(VOCABULARY)


def electra(seed):
    config = ElectraConfig(**ENCODER, d_embedding=16)
    d, g = (
        models.create(ElectraConfig(**{**ENCODER, "d_embedding": 16, "head": h}), seed + i)
        for i, h in enumerate(("replaced_token", "masked_lm"))
    )
    assert config.head is None
    g.embeddings.tokens.weight = d.embeddings.tokens.weight  # shared, as in the paper
    return Electra(d, g)


TEACHER = models.create(BertConfig(**ENCODER, head="masked_lm"), 9).freeze()
RUNS = {
    "masked": (lambda seed: models.create(BertConfig(**ENCODER, head="masked_lm"), seed), MASKED),
    "static": (lambda seed: models.create(BertConfig(**ENCODER, head="masked_lm"), seed), data.Masked(VOCABULARY, copies=10)),
    "next": (lambda seed: models.create(BertConfig(**ENCODER, head="pretraining"), seed), data.SentencePairs(MASKED, ends=(5,))),
    "order": (
        lambda seed: models.create(AlbertConfig(**ENCODER, d_embedding=16, n_inner=1, head="pretraining"), seed),
        data.SentencePairs(MASKED, "order", ends=(5,)),
    ),
    "spans": (lambda seed: models.create(T5Config(**SMALL, n_encoder_layer=2, head_dim=12), seed), data.SpanCorruption(VOCABULARY)),
    "permutation": (lambda seed: models.create(XLNetConfig(**SMALL), seed), data.Permutation(VOCABULARY)),
    "replaced": (electra, data.Replaced.of(VOCABULARY)),
    "distillation": (lambda seed: Distilled(student_of(TEACHER, (1,), seed)), data.Distillation(MASKED, teacher(TEACHER))),
}


def run(name, out=None, stop=None, objective=None, **more):
    make, usual = RUNS[name]
    model = make(1)
    options = {"steps": 12, "batch": 4, "context": 24, "warmup": 2, "eval_every": 6, "eval_batches": 4, "lr": 5e-3, "accumulate": 2}
    seen = []
    for step in train(model, CORPUS, objective=objective or usual, out=out, save_every=6 if out else 0, **options | more):
        seen.append(step)
        if step.step == stop:
            break
    return model, seen


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_exactly(name, tmp_path):
    whole, seen = run(name, tmp_path / "whole")
    assert seen[-1].validation_loss is not None
    assert seen[0].tokens_per_second > 0
    assert 0 < seen[0].roof_share < 1
    run(name, tmp_path / "half", stop=5)
    resumed, rest = run(name, tmp_path / "half", resume=True)
    assert [s.loss for s in rest] == [s.loss for s in seen[5:]]
    assert [s.validation_loss for s in rest] == [s.validation_loss for s in seen[5:]]
    for key, p in whole.named_parameters().items():
        assert p.data.tobytes() == resumed.named_parameters()[key].data.tobytes(), key
    saved = hub.load_folder_or_gguf(tmp_path / "whole" / "step-000012")[0]
    assert type(saved) is type(getattr(whole, "model", whole))
    other = _changed(RUNS[name][1])
    with pytest.raises(ValueError, match="of another run: objective was"):
        run(name, tmp_path / "half", objective=other, resume=True, steps=20)


def _changed(objective):
    if hasattr(objective, "masked"):
        return replace(objective, masked=replace(objective.masked, rate=0.2))
    return replace(objective, **({"K": 7} if isinstance(objective, data.Permutation) else {"rate": 0.2}))


@pytest.mark.parametrize("name", ["masked", "next", "spans", "permutation", "replaced"])
def test_every_objective_beats_guessing_by_frequency(name):
    """On held-out text, by more than chance could: what is around a token was used."""
    objective = RUNS[name][1]
    model, _ = run(name, steps=250, eval_every=0, accumulate=1, batch=16, lr=2e-3 if name == "replaced" else 5e-3)
    held = evaluate(model, CORPUS, 8, 24, objective=objective)
    guessed = guess(model, CORPUS, objective, Namespace(batch=8, context=24, seed=0))
    assert held < guessed - 0.1, (held, guessed)
    assert evaluate(model, CORPUS, 8, 24, objective=objective) == held


def test_costs():
    """By hand: 6 a weight and token, attention's two products, heads where something is asked."""
    gpt = models.create(models.GPTConfig(V, context=24, d_model=24, n_layer=2, n_head=2))
    batch = data.Causal()(np.zeros((3, 17), int))
    assert sources.cost(gpt)(batch) == (48, pytest.approx(48 * sources.flops_per_token(gpt, 16)))
    bert, batch = RUNS["masked"][0](1), MASKED(np.full((3, 14), 7))
    layer = 4 * 24 * 24 + 2 * 24 * 48
    want = 48 * 2 * (6 * layer + 12 * 24 * 16) + 6 * V * 24 * 6  # the head's own square is left out
    assert sources.cost(bert)(batch) == (48, pytest.approx(want))
    t5, batch = RUNS["spans"][0](1), data.SpanCorruption(VOCABULARY)(np.full((2, 20), 7))
    S, T = batch.source_ids.shape[1], batch.decoder_ids.shape[1]
    encoder = 2 * S * (2 * 6 * layer + 6 * 32 * 2 + 2 * 12 * 24 * S)
    decoder = 2 * T * (2 * 6 * (layer + 4 * 24 * 24) + 6 * 32 * 2 + 2 * 12 * 24 * S * 1.5)
    assert sources.cost(t5)(batch) == (2 * (S + T), pytest.approx(encoder + decoder, rel=0.01))


# Fit


def test_what_does_not_fit_is_refused():
    bert = RUNS["masked"][0](1)
    t5, xlnet = RUNS["spans"][0](1), RUNS["permutation"][0](1)
    bare = models.create(BertConfig(**ENCODER), 0)
    gpt = models.create(models.GPTConfig(V, context=24, d_model=24, n_layer=1, n_head=2))
    task = models.with_head(bert, "sequence_classification")
    labelled, pairing = data.Labelled([[6, 7]], [1]), RUNS["next"][1]
    for model, given, objective, message in (
        (bert, CORPUS, None, r"objective must be given: Bert with the head masked_lm learns by data\.Masked"),
        (t5, CORPUS, None, r"objective must be given: T5 learns by data\.SpanCorruption"),
        (xlnet, CORPUS, None, r"objective must be given: XLNet learns by data\.Permutation"),
        (bare, CORPUS, MASKED, "nothing: it has no head for Bert with the head None, got Masked"),
        (bert, CORPUS, data.SpanCorruption(VOCABULARY), r"data\.Masked for Bert with the head masked_lm, got SpanCorruption"),
        (gpt, CORPUS, MASKED, r"data\.Causal for GPT, got Masked"),
        (t5, CORPUS, data.Causal(), r"data\.SpanCorruption for T5, got Causal"),
        (task, CORPUS, MASKED, r"labelled examples \(data\.Labelled\) for Bert with the head sequence_classification"),
        (gpt, labelled, None, r"data must not be Labelled for GPT: .*with_head"),
        (bert, labelled, None, "data must not be Labelled for Bert"),
        (task, labelled, MASKED, "objective must be None: Labelled gives batches"),
        (bert, data.Documents([[[6, 7]], [[8]]]), MASKED, r"data\.SentencePairs for Documents, got Masked"),
        (RUNS["next"][0](1), CORPUS, replace(pairing, ends=()), "`ends` must say which ids end a sentence"),
        (bert, CORPUS, data.Masked(data.Vocabulary(99, mask=3)), "vocab_size must be at least the objective's 99, got 40"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, given, objective=objective, steps=1, context=16)
    with pytest.raises(ValueError, match=r"at most 3 tokens in an example, got 5: cut it or give context"):
        train(task, data.Labelled([[6] * 5], [0]), steps=1, context=3)
    with pytest.raises(TypeError, match="must be a language model, got int"):
        sources.trains(3)


def test_xlnet_that_is_causal_learns_the_next_token():
    model = models.create(XLNetConfig(**SMALL, attn_type="uni"), 0)
    steps = list(train(model, CORPUS, steps=30, batch=4, context=24, warmup=2, lr=5e-3))
    assert steps[-1].loss < steps[0].loss - 0.3


@pytest.mark.parametrize("name", RUNS)
def test_rows_of_special_tokens_do_not_end_a_run(name):
    """Nothing can be asked of them: a batch that has no other row counts for nothing, and the run goes on."""
    tokens = np.array(([5, 6, 7, 5, 5] + [3] * 120 + [5, 8, 9, 5, 5] + [3] * 120) * 3, np.uint16)
    make, objective = RUNS[name]
    options = {"steps": 20, "batch": 1, "context": 24, "eval_every": 20}
    seen = list(train(make(1), data.Corpus(tokens, tokens, V), objective=objective, **options))
    assert all(np.isfinite([s.loss, s.grad_norm]).all() and not s.skipped for s in seen)
    assert len({s.loss for s in seen}) > 1


def test_held_out_text_of_one_document():
    """It gives no pairs; where it is to be evaluated, that is said."""
    objective = RUNS["next"][1]
    short = data.Corpus(CORPUS.train, np.arange(6, 36, dtype=np.uint16), V)
    assert len(list(train(RUNS["next"][0](1), short, objective=objective, steps=2, batch=2, context=24))) == 2
    with pytest.raises(ValueError, match=r"eval_every needs held-out data: .* for sentence pairs one of several documents"):
        train(RUNS["next"][0](1), short, objective=objective, steps=2, batch=2, context=24, eval_every=1)


def test_documents_with_held_out_ones():
    objective = RUNS["next"][1]
    held = data.Documents.cut(CORPUS.validation, (5,))
    whole = data.Documents.cut(CORPUS.train, (5,))
    whole.validation = held
    model, same = RUNS["next"][0](1), RUNS["next"][0](1)
    options = {"objective": objective, "steps": 4, "batch": 4, "context": 24, "eval_every": 4}
    a, b = list(train(model, whole, **options)), list(train(same, CORPUS, **options))
    assert [s.loss for s in a] == [s.loss for s in b]  # a Corpus is cut in the same way
    assert a[-1].validation_loss == b[-1].validation_loss


# Transfer


def labelled_lines(n, seed, per_token=False):
    """Is there a 9 before a 12? Or for each token: was the one before it even?"""
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([[1], rng.integers(6, 20, int(rng.integers(4, 12))), [2]]) for _ in range(n)]
    if per_token:
        labels = [np.concatenate([[-100], (row[:-2] % 2 == 0).astype(int), [-100]]) for row in rows]
    else:
        labels = [int(9 in row.tolist() and 12 in row.tolist()[row.tolist().index(9) :]) for row in rows]
        rows = [r for i, r in enumerate(rows) if labels[i] or i % 3 == 0]
        labels = [x for i, x in enumerate(labels) if x or i % 3 == 0]
    return data.Labelled(rows, labels, per_token=per_token)


@pytest.mark.parametrize("per_token", [False, True])
def test_fine_tuning_a_loaded_encoder(tmp_path, per_token):
    base = models.create(BertConfig(**{**ENCODER, "d_model": 32}, head="masked_lm"), 3)
    base.freeze()
    fastlm.LM(base).save(tmp_path / "base")
    loaded = fastlm.load(tmp_path / "base").model
    model = models.with_head(
        loaded, "token_classification" if per_token else "sequence_classification", labels=("no", "yes"), seed=1
    )
    ours, theirs = model.named_parameters(), base.named_parameters()
    for name, p in ours.items():
        if name in theirs and not name.startswith("head."):
            np.testing.assert_array_equal(p.data, theirs[name].data)
            assert p.data is not theirs[name].data
    examples, held = labelled_lines(6000, 0, per_token), labelled_lines(300, 1, per_token)
    examples = replace(examples, validation=held)
    seen = list(train(model, examples, steps=300, batch=16, lr=3e-3, warmup=20, eval_every=100, out=tmp_path / "run"))
    batch = held.batch(range(len(held)))
    logits = model.logits(batch.ids, batch.mask)
    asked = batch.targets != -100
    right = (logits.argmax(-1) == batch.targets)[asked].mean()
    most = max(batch.targets[asked].mean(), 1 - batch.targets[asked].mean())
    assert right > 0.93 > most + 0.1, (right, most)
    assert seen[-1].validation_loss == evaluate(model, held, 16, 24)
    tuned = fastlm.load(tmp_path / "run" / "step-000300").model
    assert tuned.config.labels == ("no", "yes")
    np.testing.assert_array_equal(tuned.logits(batch.ids, batch.mask), logits)


def examples_for(kind, rng):
    """A head, and labels of 7 examples of which some are not asked."""
    if (
        kind == "answers"
    ):  # of one length, since no padding may be in the softmax; the second ends beyond its tokens, the third has none
        return "question_answering", [[0, 1], [2, 9], [9, 9], [3, 5], [9, 1], [0, 0], [4, 5]]
    head = "token_classification" if kind == "tokens" else "sequence_classification"
    if kind == "tokens":
        return head, [np.where(rng.random(6) < 0.5, rng.integers(0, 2, 6), -100) for _ in range(7)]
    if kind == "numbers":
        return head, [[-100.0, 2.0]] + [[1.0, 3.0]] * 6  # -100 is a number like others
    if kind == "several":
        return head, [[-100.0, -100.0]] + [[1.0, -100.0]] * 2 + [[1.0, 0.0]] * 4
    return head, [1, -100, -100, 0, 1, -100, 1]


@pytest.mark.parametrize("kind", ["answers", "tokens", "numbers", "several", "single"])
def test_what_is_evaluated_does_not_depend_on_the_batch(kind):
    """A batch's mean weighs as much as was asked in it: ignored answers and labels in floats counted as well, and of answers the
    starts and the ends are two means."""
    rng = np.random.default_rng(5)
    head, labels = examples_for(kind, rng)
    config = BertConfig(**ENCODER, head=head, labels=("no", "yes"), **({"problem": "regression"} if kind == "numbers" else {}))
    model = models.create(config, 3)
    for p in model.named_parameters().values():
        p.data[...] = rng.standard_normal(p.shape) * 0.3
    examples = data.Labelled(rng.integers(6, 20, (7, 6)), labels, per_token=kind == "tokens")
    whole = model.loss(**examples.batch(range(7))._asdict()).item()
    for batch in (1, 2, 3, 7):
        assert evaluate(model, examples, batch, 24) == pytest.approx(whole, rel=1e-6)


def test_an_answer_in_the_padding_is_none():
    """Of an example alone it was none, in a batch with a longer one it was asked for where that is padding."""
    rng = np.random.default_rng(6)
    model = models.create(BertConfig(**ENCODER, head="question_answering"), 3)
    examples = data.Labelled([rng.integers(6, 20, 4), rng.integers(6, 20, 9)], [[2, 5], [3, 7]])
    batch = examples.batch([0, 1])._replace(targets=np.array([[2, -100], [3, 7]]))
    assert evaluate(model, examples, 2, 24) == pytest.approx(model.loss(**batch._asdict()).item(), rel=1e-6)
    (trained,) = train(model, replace(examples, validation=examples), steps=1, batch=2, lr=1e-30, warmup=0, eval_every=1)
    assert trained.loss == pytest.approx(trained.validation_loss, rel=1e-6)


def test_tokens_and_sentences_are_two_means():
    model = models.create(BertConfig(**ENCODER, head="pretraining"), 3)
    objective = RUNS["next"][1]
    found = [evaluate(model, CORPUS, batch, 24, objective=objective) for batch in (1, 2, 5, 100)]
    assert found == pytest.approx(found[:1] * 4, rel=1e-6)


@pytest.mark.parametrize("head", ["pretraining", "question_answering"])
def test_a_batch_of_two_means_is_run_once(head, monkeypatch):
    """The body, and each part of the head, which was computed for each of the means."""
    model = models.create(BertConfig(**ENCODER, head=head), 3)
    calls = []

    def count(cls, name):
        method = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *given: (calls.append(cls.__name__), method(self, *given))[1])

    count(Bert, "hidden")
    if head == "pretraining":
        count(MaskedLM, "__call__")
        count(NextSentence, "__call__")
        evaluate(model, CORPUS, 4, 24, 1, RUNS["next"][1])
        assert calls == ["Bert", "MaskedLM", "NextSentence"]
    else:
        count(QuestionAnswering, "__call__")
        evaluate(model, data.Labelled(np.full((7, 6), 8), [[0, 1]] * 7), 4, 24, 1)
        assert calls == ["Bert", "QuestionAnswering"]


# Distillation


def reference_distillation(s, t, hs, ht, targets, T):
    """float64: 5 KL T^2 + 2 CE + cosine distance, of rows."""
    s, t, hs, ht = (x.astype(np.float64) for x in (s, t, hs, ht))

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p = np.exp(log_softmax(t / T))
    kl = (p * (log_softmax(t / T) - log_softmax(s / T))).sum(-1).mean() * T * T
    asked = targets != -100
    ce = -log_softmax(s)[asked, targets[asked]].mean()
    cosine = (hs * ht).sum(-1) / np.sqrt((np.square(hs).sum(-1) + 1e-12) * (np.square(ht).sum(-1) + 1e-12))
    return 5 * kl + 2 * ce + (1 - cosine).mean()


def test_distilled_loss_is_the_sum_over_what_is_there():
    student = student_of(TEACHER, (1,))
    rows = [np.arange(6, 20), np.arange(7, 12)]
    batch = data.Distillation(MASKED, teacher(TEACHER))(rows)
    got = Distilled(student).loss(**batch._asdict()).item()
    there = batch.mask
    s, hs = teacher(student)(batch.ids, batch.mask)
    want = reference_distillation(
        s[there], batch.teacher_logits[there], hs[there], batch.teacher_states[there], batch.targets[there], 2.0
    )
    assert got == pytest.approx(want, rel=1e-5)


def test_student_takes_layers():
    model = models.create(BertConfig(**{**SMALL, "n_layer": 12}, context=24, head="pretraining"), 5)
    student = student_of(model)
    assert student.config.n_layer == 6
    theirs = model.named_parameters()
    for ours, layer in enumerate((0, 2, 4, 7, 9, 11)):
        for name, p in student.blocks[ours].named_parameters().items():
            np.testing.assert_array_equal(p.data, theirs[f"blocks.{layer}.{name}"].data)
    np.testing.assert_array_equal(student.head.dense.weight.data, model.head.tokens.dense.weight.data)
    whole = student_of(models.create(BertConfig(**ENCODER, head="masked_lm"), 7), (0, 1))
    bert = models.create(BertConfig(**ENCODER, head="masked_lm"), 7)
    ids = np.arange(6, 20)[None]
    np.testing.assert_allclose(whole.logits(ids), bert.logits(ids), atol=1e-5)  # all layers: the same model
    with pytest.raises(ValueError, match=r"\[student_of\] layers must be from 0 to 1, got \[0, 2\]"):
        student_of(bert, (0, 2))
    with pytest.raises(ValueError, match="must be a Bert with the head"):
        student_of(whole)
    narrow = models.create(models.distilbert.DistilBertConfig(**{**ENCODER, "d_model": 12}, head="masked_lm"))
    batch = data.Distillation(MASKED, teacher(TEACHER))([np.arange(6, 20)])
    with pytest.raises(ValueError, match="teacher_states must be as wide as the student, 12, got 24; or cos=0"):
        Distilled(narrow).loss(**batch._asdict())
    assert Distilled(narrow, cos=0).loss(**batch._asdict()).item() > 0


def test_student_comes_closer_to_its_teacher():
    """A teacher that has learnt; the student's held-out divergence from it falls to less than half, its own loss too."""
    mentor = RUNS["masked"][0](2)
    for _ in train(mentor, CORPUS, objective=MASKED, steps=200, batch=8, context=24, warmup=10, lr=5e-3):
        pass
    mentor.freeze()
    objective = data.Distillation(MASKED, teacher(mentor))
    model = Distilled(student_of(mentor, (0,)))
    only_kl = Distilled(model.model, ce=1, mlm=0, cos=0)
    before = evaluate(only_kl, CORPUS, 8, 24, objective=objective), evaluate(model.model, CORPUS, 8, 24, objective=MASKED)
    for _ in train(model, CORPUS, objective=objective, steps=150, batch=8, context=24, warmup=10, lr=3e-3):
        pass
    after = evaluate(only_kl, CORPUS, 8, 24, objective=objective), evaluate(model.model, CORPUS, 8, 24, objective=MASKED)
    assert after[0] < 0.5 * before[0], (before, after)
    assert after[1] < before[1], (before, after)
