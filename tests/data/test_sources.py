"""Held-out examples apart by their source: names, rows, batches."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.data.example import Example, RatedExample
from mud_puppy.data.loader import Loader
from mud_puppy.data.preference_batches import collate_rated
from mud_puppy.data.sources import (
    LONGEST,
    MOST,
    NO_SOURCE,
    OTHERS,
    batches_apart,
    rows_apart,
    source_names,
)

# What TensorBoard leaves as it is in a name.
TAG = re.compile(r"[-\w.]+")


def rated(source: str, size: int = 5) -> RatedExample:
    weights = np.ones(size, np.float32)
    weights[0] = 0
    return RatedExample(Example(np.arange(size, dtype=np.int32), weights, "a:1"), 1, 1.0, source)


def names(*sources: str) -> list[str]:
    return source_names([rated(source) for source in sources])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s0", "s0"),
        ("Ünïcode-1.5_b", "Ünïcode-1.5_b"),
        ("org/data set:train", "org_data_set_train"),
        ("", NO_SOURCE),
        (" /// ", NO_SOURCE),
        ("\x1b[31m\n", "31m"),
        ("other_sources", "other_sources_2"),
        (f"head{'x' * 100}tail", f"head{'x' * 15}..{'x' * 15}tail"),
    ],
)
def test_a_source_has_a_name_that_loggers_take(source, name):
    assert names("other", source) == ["other", name]
    assert len(name) <= LONGEST and TAG.fullmatch(name)


def test_names_are_of_two_sources_or_of_none():
    assert names("a", "a") == names("", "") == ["", ""]
    plain = Example(np.zeros(3, np.int32), np.ones(3, np.float32), "a:1")
    assert source_names([plain, plain]) == ["", ""]
    assert names("a b", "a/b", "a b", "a_b") == ["a_b", "a_b_2", "a_b", "a_b_3"]


def test_ten_thousand_sources_are_twenty_names():
    sources = [f"s{i}" for i in range(10_000)] + ["s77", "s5"]
    found = Counter(names(*sources))
    assert len(found) == MOST and found[OTHERS] == 10_002 - found["s77"] - found["s5"] - 17
    assert (found["s77"], found["s5"]) == (2, 2)
    assert OTHERS not in names(*[f"s{i}" for i in range(MOST)])


@settings(max_examples=60, deadline=None)
@given(
    made=st.lists(st.tuples(st.sampled_from("abc"), st.integers(3, 30)), min_size=1, max_size=25),
    batch_size=st.integers(1, 4),
    packed=st.booleans(),
)
def test_each_example_stands_once_in_batches_of_its_source(made, batch_size, packed):
    examples = [rated(source, size) for source, size in made]
    loader = Loader(
        examples,
        batch_size,
        max_seq_length=40,
        pack=packed,
        shuffle=False,
        collate=collate_rated,
        bins=rows_apart(examples, 40, packed),
    )
    wanted, seen, shapes = source_names(examples), [], set()
    for name, rows in batches_apart(loader):
        held = [i for r in rows for i in loader.rows[r]]
        assert {wanted[i] for i in held} == {name}
        seen += held
        batch = loader.batch_of(rows)
        assert batch["answer_weights"].sum() == len(held)
        shapes.add(tuple(sorted((key, array.shape) for key, array in batch.items())))
    assert sorted(seen) == list(range(len(examples)))
    assert len(shapes) == 1  # so that one program does for all


def test_one_source_has_the_batches_of_its_loader():
    examples = [rated("a", size) for size in (5, 9, 30, 12, 4)]
    loader = Loader(examples, 2, max_seq_length=32, shuffle=False, collate=collate_rated)
    assert rows_apart(examples, 32, True) is None
    found = [loader.batch_of(rows) for _, rows in batches_apart(loader)]
    assert {name for name, _ in batches_apart(loader)} == {""}
    for step, batch in enumerate(found):
        for key, array in loader.batch_at(step).items():
            assert np.array_equal(batch[key], array)
    assert len(found) == loader.steps_per_epoch


def test_rows_that_mix_sources_are_refused():
    loader = Loader([rated("a"), rated("b")], 1, max_seq_length=32, collate=collate_rated)
    with pytest.raises(ValueError, match="make the loader with rows_apart"):
        batches_apart(loader)
