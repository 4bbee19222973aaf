r"""How good scores are, against what is known of the rows: pairs, labels, steps. numpy only.

Every function takes what is known and what was scored of the same rows, and gives plain numbers by
name; a number that does not exist (a correlation of equal values, a share of nothing) is nan.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

BINS = 10

Figures = dict[str, float]


def of_pairs(
    chosen: Float[np.ndarray, " n"], rejected: Float[np.ndarray, " n"], bins: int = BINS
) -> Figures:
    r"""pairs; accuracy: the share with the higher score on the chosen answer (a tie is wrong);
    margin: the mean of chosen - rejected; log_loss: the mean of $-\log\sigma(margin)$; ece.

    ece, the expected calibration error (https://arxiv.org/abs/1706.04599, Eq. 3): a model of pairs
    says that the answer with the higher score is the chosen one with probability
    $\sigma(|margin|)$. In `bins` bins of equal width over [0.5, 1], the mean of
    |accuracy - mean probability|, weighted by the pairs in the bin.

    >>> found = of_pairs(np.array([2.0, 0.0]), np.array([0.0, 2.0]))
    >>> found["accuracy"], round(found["ece"], 4)  # sigmoid(2) = 0.8808 is said of both
    (0.5, 0.3808)
    """
    margin = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    right = margin > 0
    # exp of nothing above 0 cannot overflow.
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    return {
        "pairs": float(len(margin)),
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "log_loss": float(np.logaddexp(0, -margin).mean()),
        "ece": calibration_error(sure, right, bins),
    }


def calibration_error(
    probability: Float[np.ndarray, " n"], right: np.ndarray, bins: int = BINS, low: float = 0.5
) -> float:
    """The expected calibration error of probabilities in [low, 1] of being right; a value on the
    edge of two bins belongs to the upper one."""
    at = np.minimum(((probability - low) / (1 - low) * bins).astype(int), bins - 1)
    gaps = np.bincount(at, weights=right - probability, minlength=bins)
    return float(np.abs(gaps).sum() / len(probability))


def of_labels(scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]) -> Figures:
    """texts; pearson and spearman (ties have the mean of their ranks); mae, in the labels' unit.

    >>> found = of_labels(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    >>> found["spearman"], round(found["pearson"], 4), round(found["mae"], 4)
    (1.0, 0.982, 0.3333)
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    return {
        "texts": float(len(scores)),
        "pearson": _correlation(scores, labels),
        "spearman": _correlation(_ranks(scores), _ranks(labels)),
        "mae": float(np.abs(scores - labels).mean()),
    }


def of_scores(scores: Float[np.ndarray, " n"], what: str = "texts") -> Figures:
    """Where nothing is known: how many `what` there are, mean and standard deviation of the
    scores."""
    return {
        what: float(len(scores)),
        "mean": float(np.mean(scores)),
        "deviation": float(np.std(scores)),
    }


def of_steps(right: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Figures:
    """rows; steps; accuracy: the share of steps that are judged as their label says.

    first_wrong: of the rows with a wrong step, the share in which the first step judged wrong is
    the first wrong one. none_wrong: of the rows without, the share in which no step is judged
    wrong. f1: their harmonic mean (https://arxiv.org/abs/2412.06559, section 3).
    right: the probabilities that a row's steps are right, which above 0.5 judge them so; labels:
    1 or 0.

    >>> found = of_steps([np.array([0.9, 0.2, 0.8])], [np.array([1, 0, 0])])
    >>> round(found["accuracy"], 4), found["first_wrong"]
    (0.6667, 1.0)
    """
    judged = [np.asarray(p) > 0.5 for p in right]
    truth = [np.asarray(label) > 0.5 for label in labels]
    same = np.concatenate([a == b for a, b in zip(judged, truth, strict=True)])
    found = [_first_false(a) == _first_false(b) for a, b in zip(judged, truth, strict=True)]
    erring = np.array([not b.all() for b in truth])
    first, none = (_mean(np.array(found)[which]) for which in (erring, ~erring))
    return {
        "rows": float(len(judged)),
        "steps": float(len(same)),
        "accuracy": float(same.mean()),
        "first_wrong": first,
        "none_wrong": none,
        "f1": 2 * first * none / (first + none) if first + none > 0 else first + none,
    }


def by_source(
    sources: Sequence[str], figures: Callable[[np.ndarray], Figures]
) -> dict[str, Figures]:
    """figures(indices of the rows) for each source, by name; empty where fewer than two differ."""
    of = np.array(sources)
    names = sorted(set(sources))
    return {n: figures(np.flatnonzero(of == n)) for n in names} if len(names) > 1 else {}


_COUNTS = ("pairs", "rows", "texts", "steps")
_WORDS = {
    "margin": "mean margin",
    "log_loss": "log loss",
    "ece": f"ECE ({BINS} bins)",
    "mae": "mean absolute error",
    "first_wrong": "first wrong step found",
    "none_wrong": "rows without one found",
    "f1": "F1",
}


def described(figures: Figures) -> str:
    """The figures in one line.

    >>> described({"texts": 2.0, "mean": 0.5, "deviation": float("nan")})
    '2 texts: mean 0.5000, deviation undefined'
    """
    counts = [f"{figures[name]:.0f} {name}" for name in _COUNTS if name in figures]
    rest = [
        f"{_WORDS.get(name, name)} {'undefined' if np.isnan(value) else f'{value:.4f}'}"
        for name, value in figures.items()
        if name not in _COUNTS
    ]
    return f"{', '.join(counts)}: {', '.join(rest)}"


def _first_false(values: np.ndarray) -> int:
    """The place of the first False; the length if there is none."""
    return int(np.argmin(values)) if not values.all() else len(values)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
