"""Batches: the contract of their arrays, determinism, resuming, prefetching."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.data.example import Example
from mud_puppy.data.loader import Loader, batch_size_for, collate_sft, prefetch, row_length


def example(length, seed=0, where="x:1"):
    rng = np.random.default_rng((length, seed))
    weights = (rng.random(length) < 0.5).astype(np.float32)
    weights[0] = 0
    return Example(rng.integers(1, 1000, length).astype(np.int32), weights, where)


def examples_of(lengths):
    return [example(n, i, f"x:{i}") for i, n in enumerate(lengths)]


def unpacked(batch):
    """The (tokens, trained targets) of each segment of a batch [A, B, T], read back from its
    arrays."""
    found = []
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for b, segments in enumerate(rows["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(rows["positions"][b, at], np.arange(len(at)))
            assert np.array_equal(rows["targets"][b, at[:-1]], rows["tokens"][b, at[1:]])
            assert rows["weights"][b, at[-1]] == 0
            tokens = rows["tokens"][b, at]
            found.append((tuple(tokens.tolist()), tuple(rows["weights"][b, at[:-1]].tolist())))
        padding = segments == 0
        assert not rows["weights"][b, padding].any() and not rows["tokens"][b, padding].any()
    return found


def given_of(examples):
    return sorted((tuple(e.tokens.tolist()), tuple(e.weights[1:].tolist())) for e in examples)


def test_collate_by_hand():
    a = Example(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.float32), "x:1")
    b = Example(np.array([8, 9], np.int32), np.array([0, 1], np.float32), "x:2")
    batch = collate_sft([[a, b], []], 6)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 9, 0], [0] * 6]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]
    assert batch["targets"].tolist() == [[6, 7, 0, 9, 0, 0], [0] * 6]
    assert batch["weights"].tolist() == [[0, 1, 0, 1, 0, 0], [0] * 6]
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "targets": np.int32,
        "weights": np.float32,
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=40),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    pack=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
def test_an_epoch_shows_each_example_once(lengths, batch_size, accumulation, pack, shuffle, seed):
    """Each example comes back exactly, and each trained token is a target once, whatever the
    order."""
    examples = examples_of(lengths)
    loader = Loader(examples, batch_size, accumulation, 90, pack, seed, shuffle)
    assert loader.length % 64 == 0
    for epoch in range(2):
        first = epoch * loader.steps_per_epoch
        batches = [loader.batch_at(first + k) for k in range(loader.steps_per_epoch)]
        shapes = {array.shape for batch in batches for array in batch.values()}
        assert shapes == {(accumulation, batch_size, loader.length)}
        found = sorted(pair for batch in batches for pair in unpacked(batch))
        assert found == given_of(examples)
        trained = sum(float(batch["weights"].sum()) for batch in batches)
        assert trained == loader.describe()["trained_tokens"]


def test_batches_are_a_function_of_seed_and_step():
    examples = examples_of(np.random.default_rng(0).integers(2, 60, 50).tolist())
    run = [Loader(examples, 2, seed=1, max_seq_length=64).batch_at(step) for step in range(30)]
    other = Loader(examples, 2, seed=1, max_seq_length=64)
    for step in reversed(range(30)):  # resumed anywhere, in any order
        resumed = other.batch_at(step)
        assert all(np.array_equal(resumed[name], run[step][name]) for name in resumed)
    epoch = other.steps_per_epoch
    assert any(not np.array_equal(run[k]["tokens"], run[k + epoch]["tokens"]) for k in range(epoch))
    another = Loader(examples, 2, seed=2, max_seq_length=64)
    assert any(
        not np.array_equal(run[k]["tokens"], another.batch_at(k)["tokens"]) for k in range(epoch)
    )


def test_without_shuffling_the_order_is_that_of_the_rows():
    examples = examples_of([5, 9, 4])
    loader = Loader(examples, 2, pack=False, shuffle=False)
    seen = [pair[0] for step in (0, 1) for pair in unpacked(loader.batch_at(step))]
    assert seen == [tuple(e.tokens.tolist()) for e in examples]


def test_row_length():
    examples = examples_of([10, 100, 30])
    assert row_length(examples, 2048, pack=False) == 128
    assert row_length(examples, 2048, pack=True) == 192  # all of them: 140
    assert row_length(examples, 128, pack=True) == 128
    assert row_length(examples, 100, pack=True) == 128
    with pytest.raises(ValueError, match="x:1 has 100 tokens, above max_seq_length 99"):
        row_length(examples, 99, pack=True)
    assert batch_size_for(8192, 2048) == 4 and batch_size_for(100, 2048) == 1


def test_describe():
    examples = examples_of([64, 32, 32])
    told = Loader(examples, 1, max_seq_length=64).describe()
    assert told == {
        "examples": 3,
        "tokens": 128,
        "trained_tokens": sum(e.trained for e in examples),
        "rows": 2,
        "row_length": 64,
        "packing_efficiency": 1.0,
        "steps_per_epoch": 2,
    }
    unpacked_told = Loader(examples, 1, max_seq_length=64, pack=False).describe()
    assert unpacked_told["rows"] == 3 and unpacked_told["packing_efficiency"] < 1


def test_packing_pads_less_than_not_packing():
    examples = examples_of(np.random.default_rng(0).integers(20, 200, 400).tolist())
    packed = Loader(examples, 4, max_seq_length=1024).describe()
    assert packed["packing_efficiency"] >= 0.98
    alone = Loader(examples, 4, max_seq_length=1024, pack=False).describe()
    assert alone["packing_efficiency"] < 0.98


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_is_batch_at(workers):
    loader = Loader(examples_of([9, 20, 31, 7, 8]), 1, max_seq_length=64)
    got = list(prefetch(loader, 3, 17, workers))
    assert len(got) == 14
    for step, batch in enumerate(got, start=3):
        assert all(np.array_equal(batch[k], v) for k, v in loader.batch_at(step).items())
    assert list(prefetch(loader, 5, 5, workers)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_raises_in_place_and_ends_its_threads(workers):
    calls, most = [], 6

    def collate(rows, length, _):
        calls.append(len(calls))
        if len(calls) > most:
            raise RuntimeError("no more")
        return collate_sft(rows, length)

    loader = Loader(examples_of([9, 20, 31]), 1, max_seq_length=64, collate=collate)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no more"):
        list(prefetch(loader, 0, 100, workers))
    assert threading.active_count() == before
    calls.clear()
    most = 100  # the threads may make the first batch last
    stream = prefetch(loader, 0, 100, workers)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert len(calls) <= 1 + 2 * max(workers, 1) + 1  # nothing is made far ahead
