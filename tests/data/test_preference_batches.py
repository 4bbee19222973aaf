"""Batches of preferences, read back from their arrays."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.data.example import Example, PairExample, RatedExample, StepsExample, split
from mud_puppy.data.loader import Loader, prefetch, row_length
from mud_puppy.data.preference_batches import (
    collate_pairs,
    collate_rated,
    collate_steps,
    kl_row_length,
)


def sequence(prompt, answer, where="x:1", holes=0):
    """Tokens of a prompt and an answer, of which all but `holes` tokens in the middle are
    trained."""
    rng = np.random.default_rng((prompt, answer))
    weights = np.r_[np.zeros(prompt), np.ones(answer)].astype(np.float32)
    if holes and answer > 2:
        weights[prompt + 1 : prompt + 1 + min(holes, answer - 2)] = 0
    return Example(rng.integers(1, 1000, prompt + answer).astype(np.int32), weights, where)


def pair(prompt, chosen, rejected, k=0, holes=0):
    a, b = sequence(prompt, chosen, f"x:{k}", holes), sequence(prompt, rejected, f"x:{k}", holes)
    b.tokens[:prompt] = a.tokens[:prompt]
    return PairExample(a, b, prompt, margin=float(k), source="s")


def answer(prompt, length, label, k=0):
    return RatedExample(sequence(prompt, length, f"x:{k}"), prompt, label)


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
PAIRS = st.lists(SIZES, min_size=1, max_size=12).map(
    lambda sizes: [pair(p, a, b, k + 1, h) for k, (p, a, b, h) in enumerate(sizes)]
)


def flat(batch):
    return {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}


def check_segments(rows):
    """Positions and targets never cross a segment, and what is not in one is empty."""
    for b, segments in enumerate(rows["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(rows["positions"][b, at], np.arange(len(at)))
            assert np.array_equal(rows["targets"][b, at[:-1]], rows["tokens"][b, at[1:]])
            assert rows["answers"][b, at[-1]] == rows["weights"][b, at[-1]] == 0
        padding = segments == 0
        for name in ("tokens", "answers", "weights", "targets"):
            assert not rows[name][b, padding].any()
        # A target belongs to the answer of its own segment.
        answers = rows["answers"][b]
        assert np.array_equal(answers[answers > 0], segments[answers > 0])


def answer_of(rows, b, k):
    """(all tokens up to the end, the trained ones, their weights) of answer k of row b."""
    end = rows["ends"][b, k]
    at = np.flatnonzero(rows["segment_ids"][b] == rows["segment_ids"][b, end])
    assert at[-1] == end
    own = rows["answers"][b] == k + 1
    tokens, targets = rows["tokens"][b, at], rows["targets"][b, own]
    return tuple(tokens.tolist()), tuple(targets.tolist()), rows["weights"][b, own]


def pairs_of(batch, ld_alpha):
    """The pairs of a batch [A, B, ...] as ((tokens, trained tokens) of both, margin)."""
    rows, found = flat(batch), []
    check_segments(rows)
    for b, i in zip(*np.nonzero(rows["pair_weights"]), strict=True):
        chosen, rejected = answer_of(rows, b, 2 * i), answer_of(rows, b, 2 * i + 1)
        counts = rows["chosen_tokens"][b, i], rows["rejected_tokens"][b, i]
        assert counts == (len(chosen[1]), len(rejected[1]))
        for _, targets, weights in (chosen, rejected):
            tail = np.arange(len(targets)) >= min(counts)
            assert np.allclose(weights, np.where(tail, ld_alpha, 1.0))
        found.append((chosen[:2], rejected[:2], float(rows["margins"][b, i])))
    empty = rows["pair_weights"] == 0
    assert not rows["margins"][empty].any() and not rows["ends"][np.repeat(empty, 2, 1)].any()
    assert np.all(rows["chosen_tokens"][empty] == 1) and np.all(rows["rejected_tokens"][empty] == 1)
    assert set(rows["pair_weights"].ravel().tolist()) <= {0.0, 1.0}
    return found


def given_pairs(examples):
    def read(one):
        return tuple(one.tokens.tolist()), tuple(one.tokens[one.weights > 0].tolist())

    return sorted((read(e.chosen), read(e.rejected), e.margin) for e in examples)


@settings(max_examples=60, deadline=None)
@given(
    examples=PAIRS,
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    pack=st.booleans(),
    ld_alpha=st.sampled_from([1.0, 0.5, 0.0]),
    on_prompt=st.booleans(),
)
def test_an_epoch_shows_each_pair_once(
    examples, batch_size, accumulation, pack, ld_alpha, on_prompt
):
    """Every pair comes back from the arrays, both answers in one row, with its weights."""
    collate = partial(collate_pairs, ld_alpha=ld_alpha, train_on_prompt=on_prompt)
    loader = Loader(examples, batch_size, accumulation, 50, pack, collate=collate)
    found = []
    for step in range(loader.steps_per_epoch):
        batch = loader.batch_at(step)
        lead = (accumulation, batch_size)
        assert batch["tokens"].shape == (*lead, loader.length)
        assert batch["pair_weights"].shape == (*lead, loader.most)
        assert batch["ends"].shape == (*lead, 2 * loader.most)
        here = pairs_of(batch, ld_alpha)
        found += here
        assert np.isclose(batch["nll_weights"].sum(), len(here), rtol=1e-5)
        check_nll(flat(batch), on_prompt)
    assert sorted(found) == given_pairs(examples)
    assert loader.describe()["trained_tokens"] == sum(
        len(one[1]) for found_pair in found for one in found_pair[:2]
    )


def check_nll(rows, on_prompt):
    """The same weight on all trained targets of the chosen answers; on their whole sequences with
    `on_prompt`."""
    weighted = rows["nll_weights"] > 0
    chosen = rows["segment_ids"] % 2 == 1
    inside = chosen & (np.roll(rows["segment_ids"], -1, 1) == rows["segment_ids"])
    inside[:, -1] = False
    want = inside if on_prompt else rows["answers"] % 2 == 1
    assert np.array_equal(weighted, want)
    assert len(set(rows["nll_weights"][weighted].tolist())) <= 1


def test_pairs_by_hand():
    tokens = [np.array(t, np.int32) for t in ([5, 6, 7, 8], [5, 6, 9])]
    weights = [np.array(w, np.float32) for w in ([0, 0, 1, 1], [0, 0, 1])]
    chosen, rejected = (Example(t, w, "x:1") for t, w in zip(tokens, weights, strict=True))
    one = PairExample(chosen, rejected, 2, margin=0.5)
    assert (one.size, one.trained, one.where) == (7, 3, "x:1")
    batch = collate_pairs([[one], []], 9, 2, ld_alpha=0.25)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 5, 6, 9, 0, 0], [0] * 9]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 9]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0], [0] * 9]
    assert batch["targets"].tolist() == [[6, 7, 8, 0, 6, 9, 0, 0, 0], [0] * 9]
    assert batch["answers"].tolist() == [[0, 1, 1, 0, 0, 2, 0, 0, 0], [0] * 9]
    assert batch["weights"].tolist() == [[0, 1, 0.25, 0, 0, 1, 0, 0, 0], [0] * 9]
    assert batch["nll_weights"].tolist() == [[0, 0.5, 0.5, 0, 0, 0, 0, 0, 0], [0] * 9]
    assert batch["ends"].tolist() == [[3, 6, 0, 0], [0, 0, 0, 0]]
    assert batch["pair_weights"].tolist() == [[1, 0], [0, 0]]
    assert batch["margins"].tolist() == [[0.5, 0], [0, 0]]
    assert batch["chosen_tokens"].tolist() == [[2, 1], [1, 1]]
    assert batch["rejected_tokens"].tolist() == [[1, 1], [1, 1]]
    kinds = {name: array.dtype for name, array in batch.items()}
    whole = {"tokens", "segment_ids", "positions", "targets", "answers", "ends"}
    assert {name for name, kind in kinds.items() if kind == np.int32} == whole
    assert {kind for name, kind in kinds.items() if name not in whole} == {np.dtype(np.float32)}
    prompt_too = collate_pairs([[one], []], 9, 2, train_on_prompt=True)["nll_weights"]
    assert np.allclose(prompt_too[0], [1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0, 0])
    with pytest.raises(AssertionError):  # the partner of the property above: it sees a swap
        swapped = {**batch, "ends": batch["ends"][:, [1, 0, 2, 3]]}
        assert pairs_of(swapped, 0.25) == pairs_of(batch, 0.25)
    assert not any(array[1].any() for name, array in batch.items() if "_tokens" not in name)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=15),
    batch_size=st.integers(1, 4),
    pack=st.booleans(),
)
def test_an_epoch_shows_each_rated_answer_once(sizes, batch_size, pack):
    """And each prompt with the answer before it in the batch."""
    examples = [answer(p, a, 0.5 * k, k) for k, (p, a) in enumerate(sizes)]
    plain = Loader(examples, batch_size, 1, 50, pack, collate=collate_rated)
    kl_length = kl_row_length(examples, plain.length, plain.most)
    collate = partial(collate_rated, kl_length=kl_length)
    loader = Loader(examples, batch_size, 1, 50, pack, collate=collate)
    found = []
    for step in range(loader.steps_per_epoch):
        batch = loader.batch_at(step)
        assert batch["kl_tokens"].shape == (1, batch_size, kl_length) and kl_length % 64 == 0
        rows = flat(batch)
        check_segments(rows)
        places = list(zip(*np.nonzero(rows["answer_weights"]), strict=True))
        here = [answer_of(rows, b, i)[:2] for b, i in places]
        labels = [float(rows["labels"][place]) for place in places]
        found += [(*one, label) for one, label in zip(here, labels, strict=True)]
        kl = {name.removeprefix("kl_"): rows[name] for name in rows if name.startswith("kl_")}
        check_segments(kl)
        for k, (b, i) in enumerate(places):
            before = here[k - 1]  # of the first, the last
            prompt = here[k][0][: len(here[k][0]) - len(here[k][1])]
            at = kl["segment_ids"][b] == i + 1
            assert tuple(kl["tokens"][b, at].tolist()) == prompt + before[1]
            own = kl["answers"][b] == i + 1
            assert tuple(kl["targets"][b, own].tolist()) == before[1]
            assert np.all(kl["weights"][b, own] == 1)
        assert kl["weights"].sum() == rows["weights"].sum() == sum(len(one[1]) for one in here)
    want = [
        (tuple(e.example.tokens.tolist()), tuple(e.example.tokens[e.shared :].tolist()), e.label)
        for e in examples
    ]
    assert sorted(found) == sorted(want)
    assert not [name for name in plain.batch_at(0) if name.startswith("kl_")]


def test_kl_rows_hold_the_worst_case():
    """A row of long prompts gets the longest answer of the row before it."""
    rows = [[answer(1, 60, 1.0)], [answer(60, 1, 1.0)]]
    batch = collate_rated(rows, 64, 1, kl_row_length([e for row in rows for e in row], 64, 1))
    assert np.count_nonzero(batch["kl_segment_ids"], axis=1).tolist() == [2, 120]
    with pytest.raises(ValueError):
        collate_rated(rows, 64, 1, 64)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=9))
def test_steps_are_labelled_where_they_end(sizes):
    rng = np.random.default_rng(len(sizes))
    examples = []
    for prompt, length in sizes:
        one = sequence(prompt, length)
        ends = np.r_[np.zeros(prompt), rng.random(length) < 0.5].astype(np.float32)
        ends[-1] = 1
        labels = (ends * (rng.random(prompt + length) < 0.5)).astype(np.int32)
        examples.append(StepsExample(Example(one.tokens, ends, "x:1"), labels))
    loader = Loader(examples, 2, 1, 32, collate=collate_steps)
    found = []
    for step in range(loader.steps_per_epoch):
        batch = flat(loader.batch_at(step))
        assert "answers" not in batch and "ends" not in batch
        assert not batch["labels"][batch["weights"] == 0].any()
        for b, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                names = ("tokens", "weights", "labels")
                found.append(tuple(tuple(batch[name][b, at].tolist()) for name in names))
    want = [
        tuple(tuple(x.tolist()) for x in (e.example.tokens, e.example.weights, e.labels))
        for e in examples
    ]
    assert sorted(found) == sorted(want)
    assert loader.describe()["trained_tokens"] == sum(e.trained for e in examples)


def test_rows_hold_whole_pairs():
    examples = [pair(10, 90, 80), pair(10, 10, 10)]
    assert row_length(examples, 100, pack=True) == 192  # above max_seq_length: 190 tokens
    assert row_length(examples, 1000, pack=True) == 256  # all: 230
    assert row_length(examples, 100, pack=False) == 192
    with pytest.raises(ValueError, match="x:0 has 100 tokens, above max_seq_length 99"):
        row_length(examples, 99, pack=True)
    loader = Loader(examples, 1, max_seq_length=100, collate=collate_pairs)
    assert (loader.most, len(loader.rows)) == (1, 2)
    told = loader.describe()
    assert (told["examples"], told["tokens"], told["trained_tokens"]) == (2, 230, 190)
    together = Loader(examples, 1, max_seq_length=256, collate=collate_pairs)
    assert (together.most, len(together.rows)) == (2, 1)
    batches = list(prefetch(together, 0, 3, 2))
    assert all(np.array_equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_split_keeps_pairs_whole():
    examples = [pair(2, 3, 4, k) for k in range(10)]
    kept, held = split(examples, 0.3, seed=1)
    assert len(held) == 3 and {e.margin for e in kept + held} == set(map(float, range(10)))
