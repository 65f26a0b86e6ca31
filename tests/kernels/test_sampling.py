from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm import _C, backend, ops
from fastlm.testing import case_id, cases, oracle, put_all, rng

REF = oracle("sampling")
CASES = pytest.mark.parametrize("case", cases("sampling"), ids=case_id)
SETTINGS = ("temperature", "top_k", "top_p", "min_p")


def middles(row: np.ndarray, **settings) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the oracle keeps, in index order, and uniform numbers that fall into the middle of each one's share.

    Shares below 1e-12 are left out: float64 cannot point into them.
    """
    stay, weights = REF.kept(row, **settings)
    ids = np.flatnonzero(stay)
    cumulative = np.cumsum(weights[ids])
    uniform = (cumulative - weights[ids] / 2) / cumulative[-1]
    wide = weights[ids] > 1e-12 * cumulative[-1]
    return ids[wide], uniform[wide]


@CASES
def test_against_oracle(isa, case):
    inputs = REF.inputs(case, rng(case))
    np.testing.assert_array_equal(ops.sample(**inputs), REF.forward(**inputs))


def check_on_device(case, put):
    """The oracle's tokens, for the case's uniform numbers and for some that fall into the middle of a kept token's share."""
    inputs = REF.inputs(case, rng(case))
    np.testing.assert_array_equal(ops.sample(**put_all(inputs, put)).numpy(), REF.forward(**inputs))
    if inputs["temperature"] == 0:
        return
    row, settings = inputs["logits"][0], {k: inputs[k] for k in SETTINGS}
    ids, uniform = middles(row, **settings)
    chosen = np.unique([0, ids.size // 2])
    got = ops.sample(put(np.tile(row, (chosen.size, 1))), uniform=uniform[chosen], **settings)
    np.testing.assert_array_equal(got.numpy(), ids[chosen])


@CASES
def test_kept_set_and_every_share(isa, case):
    """Uniform numbers in the middle of each kept token's share give exactly that token: the kept sets and the distributions agree."""
    inputs = REF.inputs(case, rng(case))
    if inputs["temperature"] == 0:
        return
    row = inputs["logits"][0]
    if inputs["repetition_penalty"] != 1:
        row = REF.penalise(row, inputs["previous"][0], inputs["repetition_penalty"])
    settings = {k: inputs[k] for k in SETTINGS}
    ids, uniform = middles(row, **settings)
    step = -(-ids.size // 100)
    ids, uniform = np.append(ids[::step], ids[-1]), np.append(uniform[::step], uniform[-1])
    got = ops.sample(np.tile(row, (ids.size, 1)), uniform=uniform, **settings)
    np.testing.assert_array_equal(got, ids)


def test_random_small_cases(isa):
    """Many combinations of filters on small rows with ties, every kept token reached."""
    generator = np.random.default_rng(5)
    for _ in range(300):
        V = int(generator.integers(1, 600))
        row = np.round(generator.standard_normal(V) * generator.choice([0.5, 4.0]), int(generator.integers(0, 4))).astype(
            np.float32
        )
        settings = {
            "temperature": float(generator.choice([0.3, 1.0, 1.7])),
            "top_k": int(generator.choice([0, 1, 3, 40, 500])),
            "top_p": float(generator.choice([0.0, 0.05, 0.5, 0.9, 0.999, 1.0])),
            "min_p": float(generator.choice([0.0, 0.02, 0.5, 1.0])),
        }
        ids, uniform = middles(row, **settings)
        np.testing.assert_array_equal(
            ops.sample(np.tile(row, (ids.size, 1)), uniform=uniform, **settings), ids, err_msg=str(settings)
        )


def test_transformers_processors():
    """The kept sets of transformers' logits processors, recorded by tests/data/make_sampling.py."""
    recorded = json.loads((Path(__file__).parent.parent / "data" / "sampling.json").read_text())
    assert len(recorded["cases"]) >= 200
    for case in recorded["cases"]:
        row, kept = np.array(case["logits"], np.float32), case["kept"]
        settings = {k: case[k] for k in (*SETTINGS, "repetition_penalty")}
        n = 400
        got = ops.sample(np.tile(row, (n, 1)), previous=[case["previous"]] * n, uniform=(np.arange(n) + 0.5) / n, **settings)
        assert set(got.tolist()) <= set(kept), case
        probabilities = np.array(case["probabilities"])
        # Each kept token takes the numbers in its share: all of those whose share is wider than the grid must appear.
        assert {i for i, p in zip(kept, probabilities, strict=True) if p > 1.001 / n} <= set(got.tolist()), case
        edges = np.concatenate([[0.0], np.cumsum(probabilities)])
        middle = (edges[:-1] + edges[1:]) / 2
        wide = probabilities > 1e-5
        got = ops.sample(
            np.tile(row, (int(wide.sum()), 1)), previous=[case["previous"]] * int(wide.sum()), uniform=middle[wide], **settings
        )
        np.testing.assert_array_equal(got, np.array(kept)[wide], err_msg=str(case))


@pytest.mark.parametrize(("p", "count"), [(0.69, 2), (0.7, 2), (0.71, 3), (1.0, 4), (0.0, 1), (0.4, 1), (0.41, 2)])
def test_top_p_at_the_boundary(isa, p, count):
    row = np.log(np.array([0.2, 0.4, 0.1, 0.3], np.float32))
    got = ops.sample(np.tile(row, (1000, 1)), top_p=p, uniform=np.arange(1000) / 1000)
    assert set(got.tolist()) == set(np.argsort(-row)[:count].tolist())


def test_ties():
    """Top-k keeps what ties with the k-th; top-p drops the lowest indices among equals; greedy takes the lowest."""
    u = np.arange(100) / 100
    row = np.array([0, 1, 1, 1], np.float32)
    assert set(ops.sample(np.tile(row, (100, 1)), top_k=2, uniform=u).tolist()) == {1, 2, 3}
    assert set(ops.sample(np.tile(np.zeros(4, np.float32), (100, 1)), top_p=0.5, uniform=u).tolist()) == {2, 3}
    assert set(ops.sample(np.tile(np.zeros(1000, np.float32), (100, 1)), top_p=0.0, uniform=u).tolist()) == {999}
    assert ops.sample(row, temperature=0).tolist() == [1]


def test_repetition_penalty():
    row = np.array([2.0, 1.9, -1.0], np.float32)
    assert ops.sample(row, temperature=0, repetition_penalty=1.5, previous=[0, 0, 2]).tolist() == [1]
    assert ops.sample(row, temperature=0, repetition_penalty=0.1, previous=np.array([1, -1], np.int32)).tolist() == [1]
    assert row.tolist() == [2.0, np.float32(1.9), -1.0]
    rows = np.stack([row, row])
    assert ops.sample(rows, temperature=0, repetition_penalty=1.5, previous=[[], [0]]).tolist() == [0, 1]


def test_exponential_is_the_kernels():
    """The oracle's weights are within 3 ulp of e^x: what the exactness of the other tests rests on."""
    x = -np.concatenate([np.linspace(0, 87, 100001), np.logspace(-8, 1, 1000)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(REF.exponential(x) - exact) <= 3 * np.spacing(exact.astype(np.float32))).all()


def test_frequencies():
    """Chi-square of 200,000 draws with our own numbers against the exact probabilities."""
    row = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    stay, weights = REF.kept(row, temperature=1.3, top_k=30, top_p=0.95)
    p = np.where(stay, weights, 0) / weights[stay].sum()
    n = 200_000
    got = ops.sample(np.tile(row, (n, 1)), temperature=1.3, top_k=30, top_p=0.95, seed=1234)
    counts = np.bincount(got, minlength=40)
    assert (counts[p == 0] == 0).all()
    degrees = int((p > 0).sum()) - 1
    statistic = float((np.square(counts - n * p)[p > 0] / (n * p[p > 0])).sum())
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees), statistic


def test_seeds_and_steps():
    row = np.zeros(1000, np.float32)
    batch = np.tile(row, (4, 1))
    first = ops.sample(batch, seed=7)
    assert first.tolist() == ops.sample(batch, seed=7).tolist()
    assert len({*first.tolist(), *ops.sample(batch, seed=7, step=1).tolist(), *ops.sample(batch, seed=8).tolist()}) >= 11
    own = ops.sample(batch, seed=[3, 4, 5, 6], step=[9, 9, 2, 9])
    assert own[2] == ops.sample(row, seed=5, step=2)[0]
    assert own[3] == ops.sample(row, seed=6, step=9)[0]
    assert ops.sample(row, seed=-1).tolist() == ops.sample(row, seed=(1 << 64) - 1).tolist()


def test_philox_known_answers():
    """The test vectors that Random123 publishes for philox4x32 with 10 rounds."""
    assert [f"{x:08x}" for x in _C.philox([0] * 4, [0] * 2)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{x:08x}" for x in _C.philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2)] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert [f"{x:08x}" for x in _C.philox(*pi)] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]
    u = np.array([_C.philox_uniform(1, row, step) for row in range(100) for step in range(100)])
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * u.size)


def test_bits_over_threads_batch_and_instruction_sets(threads):
    logits = np.random.default_rng(8).standard_normal((64, 5000)).astype(np.float32)
    settings = {"temperature": 0.8, "top_p": 0.95, "seed": 3}
    results, before = set(), _C.isa()
    for name in _C.isas():
        _C.set_isa(name)
        for n in (1, 2, 3):
            backend.set_num_threads(n)
            results.add(ops.sample(logits, **settings).tobytes())
    _C.set_isa(before)
    assert len(results) == 1
    u = np.linspace(0, 0.99, 64)
    together = ops.sample(logits, 0.8, 50, 0.95, uniform=u)
    alone = [ops.sample(logits[b], 0.8, 50, 0.95, uniform=u[b : b + 1])[0] for b in range(64)]
    assert together.tolist() == alone


@pytest.mark.parametrize("N", [1, 15, 16, 17, 127, 128, 129, 1000, 50257])
def test_top_k_and_argmax(isa, N):
    generator = np.random.default_rng(N)
    for round_to in (0, 6):
        x = np.round(generator.standard_normal((3, N)), round_to).astype(np.float32)
        x[0, generator.random(N) < 0.5] = -np.inf
        for k in {1, min(2, N), min(10, N), (N + 1) // 2, N} if N < 5000 else {1, 8, 300}:
            order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
            values, indices = ops.top_k(x, k)
            np.testing.assert_array_equal(indices, order)
            np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=-1))
        np.testing.assert_array_equal(ops.argmax(x), np.argmax(x, axis=-1))


@pytest.mark.parametrize("V", [3, 16, 130, 2000])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_not_finite(isa, V, settings):
    for at in (0, V // 2, V - 1):
        x = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
        x[1, at] = np.nan
        with pytest.raises(ValueError, match=r"\[sample\] logits row 1 has nan"):
            ops.sample(x, **settings)
        x[1] = -np.inf
        with pytest.raises(ValueError, match=r"\[sample\] logits row 1 is all -inf"):
            ops.sample(x, **settings)
        x[1, at] = 3
        assert ops.sample(x, **settings)[1] == at
        x[1, at] = np.inf
        if settings.get("temperature") == 0:
            assert ops.sample(x, **settings)[1] == at
        else:
            with pytest.raises(ValueError, match=r"\[sample\] logits row 1 has \+inf"):
                ops.sample(x, **settings)
    with pytest.raises(ValueError, match=r"\[top_k\] values row 0 has nan"):
        ops.top_k(np.array([0, np.nan, 1], np.float32), 2)
    with pytest.raises(ValueError, match=r"\[argmax\] logits row 0 has nan"):
        ops.argmax(np.array([0, np.nan, 1], np.float32))


@pytest.mark.parametrize("N", [1, 16, 130, 2000])
def test_argmax_of_a_token(isa, N):
    """As at temperature 0, a row that is all -inf has none; without `token` its greatest is the first."""
    x = np.random.default_rng(N).standard_normal((3, N)).astype(np.float32)
    np.testing.assert_array_equal(ops.argmax(x, token=True), np.argmax(x, axis=-1))
    x[1] = -np.inf
    assert ops.argmax(x)[1] == 0
    with pytest.raises(ValueError, match=r"\[argmax\] logits row 1 is all -inf: no token is possible"):
        ops.argmax(x, token=True)
    x[1, -1] = np.inf
    assert ops.argmax(x, token=True)[1] == N - 1
    x[1, -1] = np.nan
    with pytest.raises(ValueError, match=r"\[argmax\] logits row 1 has nan"):
        ops.argmax(x, token=True)


def test_extreme_but_finite(isa):
    """Sums that overflow, and infinities of one sign, are not mistaken for nan."""
    x = np.full((1, 300), 3e38, np.float32)
    x[0, ::2] = -3e38
    assert ops.argmax(x)[0] == 1
    assert ops.sample(x, top_p=0.9, uniform=[0.0])[0] % 2 == 1
    with pytest.raises(ValueError, match="when divided by the temperature"):
        ops.sample(x, temperature=1e-3)


def test_top_k_of_the_vocabulary_or_more_drops_nothing():
    x = np.random.default_rng(3).standard_normal((64, 9)).astype(np.float32)
    for k in (9, 10, 1 << 40, 1 << 80):
        np.testing.assert_array_equal(ops.sample(x, top_k=k, seed=5), ops.sample(x, seed=5))


def test_refuses():
    x = np.zeros((2, 8), np.float32)
    for name, bad, message in [
        ("temperature", -1.0, r"temperature must be at least 0"),
        ("temperature", np.nan, r"temperature must be at least 0"),
        ("top_p", 1.5, r"top_p must be from 0 to 1"),
        ("min_p", -0.1, r"min_p must be from 0 to 1"),
        ("temperature", 1e39, r"temperature must be .* finite in float32, got 1e\+39"),
        ("top_k", -1, r"top_k must be an integer of at least 0"),
        ("top_k", 2.5, r"top_k must be an integer of at least 0 \(0: off\), got 2\.5"),
        ("top_k", np.nan, r"top_k must be an integer of at least 0 \(0: off\), got nan"),
        ("repetition_penalty", 1e-46, r"repetition_penalty must be .* finite in float32, got 1e-46"),
        ("repetition_penalty", 1e39, r"repetition_penalty must be .* finite in float32, got 1e\+39"),
        ("repetition_penalty", 0.0, r"repetition_penalty must be greater than 0"),
        ("uniform", [0.5], r"uniform must be \(B,\) = \(2,\), got \(1,\)\. logits is \(2, 8\)\."),
        ("uniform", [0.5, 1.0], r"logits row 1 has a uniform number that is not from 0 to below 1"),
        ("seed", [1, 2, 3], r"seed must be an int or one per row, \(B,\) = \(2,\), got 3"),
    ]:
        with pytest.raises(ValueError, match=rf"\[sample\] {message}"):
            ops.sample(x, **{name: bad})
    with pytest.raises(ValueError, match=r"row 1 has an id in previous that is not in the vocabulary"):
        ops.sample(x, repetition_penalty=2.0, previous=[[0], [8]])
    with pytest.raises(ValueError, match=r"previous must hold ids for each row, \(B, N\) with B = 2, got 1 rows"):
        ops.sample(x, repetition_penalty=2.0, previous=[[0]])
    with pytest.raises(TypeError, match=r"logits must be float32, got float64"):
        ops.sample(np.zeros(4))
    with pytest.raises(ValueError, match=r"logits must be \(B, V\) or \(V,\), got shape \(1, 2, 3\)"):
        ops.sample(np.zeros((1, 2, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[top_k\] k must be from 1 to N = 8, got 9"):
        ops.top_k(x, 9)
    assert ops.sample(np.zeros((0, 8), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("temperature", None, "temperature must be a number, got NoneType"),
        ("temperature", "1", "temperature must be a number, got str"),
        ("top_p", [1.0, 2.0], "top_p must be a number, got list"),
        ("min_p", None, "min_p must be a number, got NoneType"),
        ("repetition_penalty", None, "repetition_penalty must be a number, got NoneType"),
        ("seed", 1.5, r"seed must be an int or one per row, \(B,\) = \(2,\), got 1\.5"),
        ("seed", None, "seed must be an int or one per row"),
        ("seed", "12", "seed must be an int or one per row"),
        ("seed", [1.5, 2], r"seed must be an int or one per row, \(B,\) = \(2,\), got \[1\.5, 2\]"),
        ("step", 1.5, "step must be an int or one per row"),
        ("step", [None, 1], "step must be an int or one per row"),
        ("uniform", "ab", r"uniform must be floats, \(B,\), got 'ab'"),
        ("previous", np.array(3, np.int32), r"previous must hold ids for each row, \(B, N\), got array\(3"),
        ("previous", 3, r"previous must hold ids for each row, \(B, N\), got 3"),
        ("out", [0, 0], "out must be an array of int32, got list"),
    ],
)
def test_refuses_what_is_no_number(name, bad, message):
    """By name: Python's own errors came, and of a list of seeds the fractions were cut off."""
    settings = {"repetition_penalty": 2.0} if name == "previous" else {}
    with pytest.raises(TypeError, match=rf"\[sample\] {message}"):
        ops.sample(np.zeros((2, 8), np.float32), **settings | {name: bad})


def test_refuses_a_k_that_is_no_integer():
    for k in (2.5, 2.0, None, "2", True):
        with pytest.raises(TypeError, match=r"\[top_k\] k must be an integer from 1 to N = 8, got"):
            ops.top_k(np.zeros((2, 8), np.float32), k)
    with pytest.raises(TypeError, match=r"\[argmax\] out must be an array of int32, got int"):
        ops.argmax(np.zeros((2, 8), np.float32), out=3)
