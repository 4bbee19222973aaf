"""Packing: every example once, no row too full, little room left."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.data.packing import efficiency, pack


@settings(max_examples=200, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 300))
def test_every_index_once_and_no_bin_over_capacity(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=200))
    bins = pack(lengths, capacity)
    assert sorted(i for row in bins for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in bins)
    assert all(bins)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=100))
def test_no_two_bins_would_fit_into_one(lengths):
    """Of the last bins: a bin is closed only when nothing left fits, up to the slack."""
    bins = pack(lengths, 100)
    least = -(-sum(lengths) // 100)
    assert least <= len(bins) <= 2 * least


def test_known_answers():
    assert pack([], 8) == []
    assert pack([3, 8, 5, 4, 4], 8) == [[1], [2, 0], [3, 4]]
    assert len(pack([6, 5, 5, 4, 3, 3, 2, 2], 10)) == 3
    assert efficiency([3, 8, 5, 4, 4], [[1], [2, 0], [3, 4]], 8) == 1.0
    assert efficiency([], [], 8) == 0.0


@pytest.mark.parametrize("lengths", [[0], [9], [-1, 3]])
def test_lengths_out_of_range(lengths):
    with pytest.raises(ValueError, match=r"do not lie in 1..8"):
        pack(lengths, 8)


@pytest.mark.parametrize(
    ("capacity", "low", "high", "least"),
    [(256, 40, 100, 0.99), (512, 40, 100, 0.99), (2048, 2, 2000, 0.98), (1024, 100, 400, 0.99)],
)
def test_efficiency_on_lengths_like_those_of_chats(capacity, low, high, least):
    lengths = np.random.default_rng(0).integers(low, high, 5000)
    bins = pack(lengths, capacity)
    assert efficiency(lengths, bins, capacity) >= least
    naive = [[i] for i in range(len(lengths))]
    assert efficiency(lengths, naive, capacity) < least


@pytest.mark.parametrize("capacity", [512, 1024, 2048])
def test_efficiency_on_a_real_chat_set(capacity):
    text = Path(__file__).with_name("chatterbot_lengths.json").read_text(encoding="utf-8")
    counts = json.loads(text)["counts"].items()
    lengths = [min(int(length), capacity) for length, count in counts for _ in range(count)]
    assert len(lengths) == 2026
    assert efficiency(lengths, pack(lengths, capacity), capacity) >= 0.98


def test_a_million_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, 1_000_000), 2, 2048).astype(int)
    bins = pack(lengths, 2048)
    assert efficiency(lengths, bins, 2048) >= 0.999
    assert np.array_equal(np.sort(np.concatenate(bins)), np.arange(len(lengths)))
