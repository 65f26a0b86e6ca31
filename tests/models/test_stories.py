"""stories260K of llama2.c, converted: the text that was published with it, character for character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastlm import hub
from fastlm.checkpoint import convert_llama2c
from fastlm.tokenizers import Tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "stories260k"


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories") / "model"
    convert_llama2c(FOLDER / "stories260K.bin", folder, Tokenizer.from_llama2c(FOLDER / "tok512.bin").save)
    return hub.load_folder_or_gguf(folder)


def greedy(model, steps):
    cache, ids, new = model.new_cache(1, steps), np.array([[1]], np.int32), []
    for _ in range(steps):
        ids[0, 0] = model.logits(ids, cache, last=True)[0].argmax()
        new.append(int(ids[0, 0]))
    return new


def test_published_text(stories):
    model, tokenizer = stories
    page = (FOLDER / "stories260K.md").read_text()
    published = page.split("-t 0.0\n")[1].split("\n```")[0]
    assert tokenizer.decode(greedy(model, 256)) == published


def test_saved_again_it_is_the_same(stories, tmp_path):
    model, tokenizer = stories
    hub.save(model, tokenizer, tmp_path / "m")
    again, tokens = hub.load_folder_or_gguf(tmp_path / "m")
    assert greedy(again, 30) == greedy(model, 30)
    assert tokens.end_ids == tokenizer.end_ids
    assert tokens.encode("Once upon a time") == tokenizer.encode("Once upon a time")
