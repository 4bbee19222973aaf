"""Figures of scores, computed by hand and by their definitions."""

import doctest
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from mud_puppy.run import calibration
from mud_puppy.run.calibration import (
    by_source,
    calibration_error,
    of_labels,
    of_pairs,
    of_scores,
    of_steps,
)

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_pairs_by_hand():
    found = of_pairs(np.array([1.0, 0.0, 2.0, 5.0]), np.array([0.0, 1.0, 2.0, 1.0]))
    assert found["pairs"] == 4
    assert found["accuracy"] == 0.5  # a tie is wrong
    assert found["margin"] == 1.0
    losses = [np.log(1 + np.exp(-m)) for m in (1, -1, 0, 4)]
    assert found["log_loss"] == pytest.approx(np.mean(losses))
    # Bins of 0.05 from 0.5: the tie in the first, sigmoid(1) = 0.731 twice in the fifth, one of
    # them right, sigmoid(4) = 0.982 in the last.
    gaps = [1 / 4 * 0.5, 2 / 4 * abs(0.5 - sigmoid(1)), 1 / 4 * (1 - sigmoid(4))]
    assert found["ece"] == pytest.approx(sum(gaps))


@pytest.mark.parametrize("bins", [5, 10, 15])
def test_calibration_is_its_definition(bins):
    """Also of both orders of every pair over [0, 1], in twice as many bins: the same number."""
    margin = RNG.normal(1, 3, 500)
    found = of_pairs(margin, np.zeros(500), bins)["ece"]
    probability = np.concatenate([sigmoid(margin), sigmoid(-margin)])
    first = np.concatenate([np.ones(500), np.zeros(500)])
    edges = np.linspace(0, 1, 2 * bins + 1)
    want = 0.0
    for low, high in pairwise(edges):
        inside = (probability >= low) & ((probability < high) | (high == 1))
        if inside.any():
            gap = abs(first[inside].mean() - probability[inside].mean())
            want += inside.mean() * gap
    assert found == pytest.approx(want, abs=1e-12)
    assert of_pairs(2 * margin, np.zeros(500), bins)["ece"] != pytest.approx(want, abs=1e-3)


def test_a_calibrated_model_has_no_error():
    sure = RNG.uniform(0.5, 1, 200_000)
    assert calibration_error(sure, RNG.random(200_000) < sure) < 0.01
    assert calibration_error(np.ones(3), np.ones(3)) == 0
    assert calibration_error(np.ones(3), np.zeros(3)) == 1


def test_huge_margins_are_finite():
    found = of_pairs(np.array([1e6, -1e6]), np.array([-1e6, 1e6]))
    assert found["log_loss"] == pytest.approx(1e6)
    assert found["ece"] == pytest.approx(0.5)


def test_labels_are_those_of_scipy():
    labels = RNG.integers(0, 5, 300).astype(float)  # with ties
    scores = (labels + RNG.normal(0, 2, 300)).round(1)
    found = of_labels(scores, labels)
    assert found["texts"] == 300
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, labels)[0])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, labels)[0])
    assert found["mae"] == pytest.approx(np.abs(scores - labels).mean())


def test_what_does_not_exist_is_nan():
    found = of_labels(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert np.isnan([found["pearson"], found["spearman"]]).all() and found["mae"] == 1.5
    assert np.isnan(of_steps([np.array([0.9])], [np.array([1])])["first_wrong"])


def test_texts_without_labels():
    assert of_scores(np.array([1.0, 3.0])) == {"texts": 2, "mean": 2, "deviation": 1}


def test_steps_by_hand():
    right = [[0.9, 0.1, 0.9], [0.9, 0.9], [0.2, 0.9], [0.9, 0.8], [0.9, 0.5]]
    labels = [[1, 0, 0], [1, 1], [1, 1], [1, 0], [1, 0]]
    found = of_steps(list(map(np.array, right)), list(map(np.array, labels)))
    assert (found["rows"], found["steps"]) == (5, 11)
    assert found["accuracy"] == pytest.approx(8 / 11)  # 0.5 judges a step wrong
    assert found["first_wrong"] == pytest.approx(2 / 3)  # rows 1 and 5 of 1, 4, 5
    assert found["none_wrong"] == pytest.approx(1 / 2)  # row 2 of 2, 3
    assert found["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_by_source():
    values = np.array([1.0, 2.0, 4.0])
    assert by_source(["b", "a", "b"], lambda which: of_scores(values[which])) == {
        "a": {"texts": 1, "mean": 2, "deviation": 0},
        "b": {"texts": 2, "mean": 2.5, "deviation": 1.5},
    }
    assert by_source(["a", "a"], lambda which: of_scores(values[which])) == {}


def test_examples():
    found = doctest.testmod(calibration)
    assert (found.failed, found.attempted) == (0, 7)
