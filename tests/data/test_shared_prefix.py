"""Pairs that stand in a row with their prompt once, read back from their arrays."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.data.example import Example, PairExample
from mud_puppy.data.loader import Batch, Loader
from mud_puppy.data.preference_batches import collate_pairs

SIZES = st.tuples(st.integers(0, 20), st.integers(1, 30), st.integers(1, 30))


def pair(sizes: tuple[int, int, int], k: int, once: bool) -> PairExample:
    prompt, *answers = sizes
    rng = np.random.default_rng((k, *sizes))
    asked, both = rng.integers(1, 1000, prompt), []
    for answer in answers:
        tokens = np.r_[asked, rng.integers(1, 1000, answer)].astype(np.int32)
        weights = np.r_[np.zeros(prompt), rng.random(answer) < 0.8].astype(np.float32)
        weights[-1], weights[0] = 1, 0
        both.append(Example(tokens, weights, f"x:{k}"))
    chosen, rejected = both
    return PairExample(chosen, rejected, prompt, margin=float(k), prompt_once=once)


def epoch(sizes: list, once: bool, **options: Any) -> tuple[Batch, Loader]:
    """All in one step: arrays [B, ...], margins say which pair is which."""
    examples = [pair(x, k, once) for k, x in enumerate(sizes)]
    collate = partial(collate_pairs, shared_prefix=once, **options)
    rows = len(Loader(examples, 1, max_seq_length=100, collate=collate).rows)
    loader = Loader(examples, rows, max_seq_length=100, collate=collate)
    return {name: x[0] for name, x in loader.batch_at(0).items()}, loader


def read(batch: Batch) -> dict[float, list]:
    """margin -> what this pair is trained on: of both answers the sequence that is seen, what
    stands at its end, and the targets with their weights; the NLL's targets; counts."""
    found = {}
    for b, i in zip(*np.nonzero(batch["pair_weights"]), strict=True):
        one: list[Any] = []
        for answer in (2 * i, 2 * i + 1):
            own = batch["segment_ids"][b] == answer + 1
            seen = own.copy()
            if "prefix_ids" in batch:
                (prefix,) = {*batch["prefix_ids"][b, own].tolist()} - {i + 1} or {0}
                assert prefix == 0 or (answer % 2 and prefix == -(i + 1))
                seen |= (prefix < 0) & (batch["prefix_ids"][b] == -prefix)
            tokens, positions = batch["tokens"][b, seen], batch["positions"][b, seen]
            assert np.array_equal(positions, np.arange(len(tokens)))
            trained = batch["answers"][b] == answer + 1
            assert not (trained & ~own).any()
            at = np.flatnonzero(trained)
            one.append(tokens.tolist())
            one.append(batch["tokens"][b, batch["ends"][b, answer]].item())
            one.append(batch["positions"][b, at].tolist())
            one.append(batch["targets"][b, at].tolist())
            one.append(batch["weights"][b, at].tolist())
        learnt = (batch["nll_weights"][b] > 0) & (batch["segment_ids"][b] == 2 * i + 1)
        one.append(batch["targets"][b, learnt].tolist())
        one.append(batch["nll_weights"][b, learnt].tolist())
        one += [batch[name][b, i].item() for name in ("chosen_tokens", "rejected_tokens")]
        found[batch["margins"][b, i].item()] = one
    learnt = batch["nll_weights"] > 0
    assert np.all(batch["segment_ids"][learnt] % 2 == 1)
    return found


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=9),
    ld_alpha=st.sampled_from([1.0, 0.5]),
    on_prompt=st.booleans(),
)
def test_the_pairs_are_those_with_both_prompts(sizes, ld_alpha, on_prompt):
    options = {"ld_alpha": ld_alpha, "train_on_prompt": on_prompt}
    once, loader = epoch(sizes, True, **options)
    twice, plain = epoch(sizes, False, **options)
    assert read(once) == read(twice) and len(read(once)) == len(sizes)
    assert "prefix_ids" not in twice
    saved = sum(max(prompt - 1, 0) for prompt, *_ in sizes)
    assert np.count_nonzero(once["segment_ids"]) == sum(e.size for e in loader.examples)
    assert loader.describe()["tokens"] == plain.describe()["tokens"] - saved
    assert loader.describe()["trained_tokens"] == plain.describe()["trained_tokens"]
    assert not once["prefix_ids"][once["segment_ids"] == 0].any()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=9))
def test_prefixes_are_as_the_model_wants_them(sizes):
    """The start of a segment, before all that see it, whose positions go on from its own."""
    batch, _ = epoch(sizes, True)
    for segments, prefixes, positions in zip(
        *(batch[name] for name in ("segment_ids", "prefix_ids", "positions")), strict=True
    ):
        for n in range(1, prefixes.max(initial=0) + 1):
            prefix, readers = np.flatnonzero(prefixes == n), np.flatnonzero(prefixes == -n)
            assert len(prefix) == 0 or len({*segments[prefix].tolist()}) == 1
            assert np.array_equal(positions[prefix], np.arange(len(prefix)))
            if len(prefix):
                assert prefix[-1] < readers[0]
                assert np.array_equal(positions[readers], len(prefix) + np.arange(len(readers)))
        assert {*(-prefixes[prefixes < 0]).tolist()} == {*prefixes[prefixes > 0].tolist()}


def test_by_hand():
    tokens = [np.array(t, np.int32) for t in ([5, 6, 7, 8, 9], [5, 6, 7, 4])]
    weights = [np.array(w, np.float32) for w in ([0, 0, 0, 1, 1], [0, 0, 0, 1])]
    chosen, rejected = (Example(t, w, "x:1") for t, w in zip(tokens, weights, strict=True))
    one = PairExample(chosen, rejected, 3, prompt_once=True)
    assert (one.size, one.starts, one.trained) == (7, (0, 2), 3)
    batch = collate_pairs([[one, one]], 15, 2, shared_prefix=True)
    assert batch["tokens"].tolist() == [2 * [5, 6, 7, 8, 9, 7, 4] + [0]]
    assert batch["positions"].tolist() == [2 * [0, 1, 2, 3, 4, 2, 3] + [0]]
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 2 + [3] * 5 + [4] * 2 + [0]]
    prefixes = [[1, 1, 0, 0, 0, -1, -1, 2, 2, 0, 0, 0, -2, -2, 0]]
    assert batch["prefix_ids"].tolist() == prefixes and batch["prefix_ids"].dtype == np.int32
    assert batch["targets"].tolist() == [2 * [6, 7, 8, 9, 0, 4, 0] + [0]]
    assert batch["answers"].tolist() == [[0, 0, 1, 1, 0, 2, 0, 0, 0, 3, 3, 0, 4, 0, 0]]
    assert batch["ends"].tolist() == [[4, 6, 11, 13]]
    empty = collate_pairs([[]], 8, 1, shared_prefix=True)
    assert empty["prefix_ids"].tolist() == [[0] * 8]
    with pytest.raises(ValueError, match="x:1: the pair has its prompt once"):
        collate_pairs([[one]], 15, 1)
    with pytest.raises(AssertionError):  # the partner of the property above: it sees a shift
        shifted = {**batch, "positions": batch["positions"] + (batch["prefix_ids"] < 0)}
        assert read(shifted) == read(batch)
