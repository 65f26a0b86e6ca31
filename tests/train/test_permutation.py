"""Permutations: both published masks against naive constructions, lengths, spans, and transformers' own collator."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm import data
from fastlm.data.objectives import pairs, permutation
from tests.train.test_objectives import RNG, VOCABULARY, text


def original(order, masked, functional):
    """The mask of the authors' code, position by position, by its words."""
    T = len(order)
    half, hidden = T // 2, np.zeros((T, T), bool)
    for i in range(T):
        for j in range(T):
            if i < half <= j:
                hidden[i, j] = True  # the first half sees nothing of the second
            elif j < half <= i:
                hidden[i, j] = False  # the second sees all of the first
            elif masked[j] or functional[j]:
                target = masked[i] and not functional[i]
                place = -1 if not (masked[i] or functional[i]) else order[i]
                # j is seen if it comes before i; by itself only if it is no target
                hidden[i, j] = not (order[j] < place or (order[j] == place and not target))
    return hidden


def huggingface(order, masked, functional):
    T, hidden = len(order), np.zeros((len(order), len(order)), bool)
    for i in range(T):
        for j in range(T):
            place = [-1 if not masked[k] and not functional[k] else order[k] for k in (i, j)]
            hidden[i, j] = masked[j] and place[0] <= place[1]
    return hidden


@pytest.mark.parametrize("style", ["original", "huggingface"])
def test_permutation_masks(style):
    ours, naive = {"original": (permutation.mask_original, original), "huggingface": (permutation.mask_huggingface, huggingface)}[
        style
    ]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        T = 2 * int(rng.integers(2, 13))
        functional = np.arange(T) >= T - 2
        functional |= np.arange(T) < rng.integers(0, 3)
        masked = (rng.random(T) < 0.4) & ~functional
        order = permutation.orders(T, rng)
        assert sorted(order[: T // 2]) == list(range(T // 2))
        np.testing.assert_array_equal(order[T // 2 :], order[: T // 2] + T // 2)
        np.testing.assert_array_equal(ours(order, masked, functional), naive(order, masked, functional))


def test_permutation_original_batch():
    rows = text(30, 62)
    batch = data.Permutation(VOCABULARY)(rows)
    assert batch.ids.shape == (30, 64)
    np.testing.assert_array_equal(batch.ids, np.concatenate([rows, np.full((30, 1), 2), np.full((30, 1), 1)], 1))
    assert batch.mask is None
    assert batch.targets.shape == (30, 64 // 6)
    assert (batch.targets != -100).all()
    at = batch.target_mapping.argmax(2)
    assert (batch.target_mapping.sum(2) == 1).all()
    assert (np.diff(at) > 0).all()
    np.testing.assert_array_equal(np.take_along_axis(batch.ids, at, 1), batch.targets)
    np.testing.assert_array_equal((at < 32).sum(1), 5)
    np.testing.assert_array_equal(batch.segments, np.where(np.arange(64) == 63, 2, 0) * np.ones((30, 1), int))
    rows_ = np.arange(30)[:, None]
    own = batch.perm_mask[rows_, at, at]
    assert own.all()  # a target does not see itself
    among = batch.perm_mask[rows_[:, None], at[:, :, None], at[:, None]]  # (30, N, N)
    assert (among | among.swapaxes(1, 2)).all()  # of two targets at most one sees the other
    seen = ~among & ~np.eye(10, dtype=bool)
    assert (seen.sum((1, 2)) == 45).all()  # and exactly one does: an order of all


def test_permutation_lengths_and_padding():
    objective = data.Permutation(VOCABULARY)
    assert [objective.window(c) for c in (512, 511, 6, 7)] == [510, 508, 4, 4]
    batch = objective([text(7), text(12), text(1)])
    assert batch.ids.shape == (3, 14)
    np.testing.assert_array_equal(batch.mask.sum(1), [9, 14, 3])
    assert batch.mask[:, -1].all()  # padding is on the left
    assert (batch.ids[~batch.mask] == 0).all()
    for b in range(3):
        asked = batch.target_mapping[b].any(0)
        assert not asked[~batch.mask[b]].any()
        assert not asked[-2:].any()
        assert asked.sum() == (batch.targets[b] != -100).sum() == min(2, batch.mask[b].sum() - 2)
    odd = objective([text(5)])
    assert odd.ids.shape == (1, 8)
    assert odd.mask.sum() == 7


def test_permutation_spans():
    """Published: spans of 1 to 5, a sixth of the tokens; in the authors' style of likelihood 1 / n and at the beginning of words."""
    masked = [permutation.spans_huggingface(510, 6, 5, rng) for rng in pairs.draws(0, 0, None, 400)]
    share = np.mean(masked)
    assert abs(share - 1 / 6) < 0.005
    special = np.arange(512) >= 510
    for starts in (None, RNG.random(512) < 0.5):
        for rng in pairs.draws(1, 0, None, 100):
            asked = permutation.spans_original(special, 85, 6, 5, rng, starts)
            assert asked.sum() == 85
            assert asked[:256].sum() == 43
            assert not asked[510:].any()
    # With no single tokens to fill up, spans keep to their lengths and places.
    lengths = np.zeros(6)
    for rng in pairs.draws(2, 0, None, 300):
        starts = np.arange(1200) % 7 == 0
        asked = permutation.spans_original(np.zeros(1200, bool), 60, 6, 5, rng, starts)
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], asked.astype(int), [0]]))))[::2]
        lengths[: len(lengths)] += np.bincount(np.minimum(runs, 5), minlength=6)
        begins = np.flatnonzero(asked & ~np.concatenate([[False], asked[:-1]]))
        assert np.mean(starts[begins]) > 0.5
    assert (np.diff(lengths[1:]) < 0).all()


def test_permutation_live():
    """The reference collator's perm_mask and spans, given its own draws."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    class Tokens:
        mask_token, mask_token_id, pad_token, pad_token_id, padding_side = "<mask>", 3, "<pad>", 0, "left"

        def get_special_tokens_mask(self, ids, already_has_special_tokens):
            return [int(i in (0, 1, 2)) for i in ids]

    collator = transformers.DataCollatorForPermutationLanguageModeling(Tokens())
    orders, drawn, real = [], [], {"randperm": torch.randperm, "randint": torch.randint}

    def randperm(n):
        orders.append(real["randperm"](n))
        return orders[-1]

    def randint(*bounds):
        drawn.append((bounds, real["randint"](*bounds)))
        return drawn[-1][1]

    class Scripted:  # gives the reference's draws to ours
        def integers(self, low, high):
            (bounds, value) = drawn.pop(0)
            assert (low, high) == ((0, bounds[0]) if len(bounds) == 2 else bounds[:2])
            return value.item()

    torch.manual_seed(0)
    ids = torch.tensor(np.concatenate([np.zeros((5, 3)), text(5, 39), np.full((5, 1), 2), np.full((5, 1), 1)], 1), dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", randperm)
        patch.setattr(torch, "randint", randint)
        inputs, perm_mask, mapping, labels = (x.numpy() for x in collator.torch_mask_tokens(ids.clone()))
    assert (mapping == np.eye(44)).all()
    for b in range(5):
        special = np.isin(ids[b].numpy(), (0, 1, 2))
        asked = permutation.spans_huggingface(44, 6, 5, Scripted()) & ~special
        np.testing.assert_array_equal(asked, labels[b] != -100)
        half = orders[b].numpy()
        mask = permutation.mask_huggingface(np.concatenate([half, half + 22]), asked, special)
        np.testing.assert_array_equal(mask, perm_mask[b] != 0)
        np.testing.assert_array_equal(inputs[b], np.where(asked, 3, ids[b]))
    assert not drawn
