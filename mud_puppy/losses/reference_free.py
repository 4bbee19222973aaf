r"""Losses of pairs that need no reference policy: ORPO, CPO and SimPO with AlphaPO."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from mud_puppy.losses.pairs import Metrics, pair_metrics

CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")


def orpo(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, ""], Metrics]:
    r"""ORPO (https://arxiv.org/abs/2403.07691, Eq. 6): NLL of the chosen answers, less beta times
    $\log\sigma(\log\mathrm{odds}_w - \log\mathrm{odds}_l)$, with odds p / (1 - p) of the answers'
    mean probability a token.

    scores["chosen"], ["rejected"]: [*P], log-probabilities of the answers, sums over their tokens;
    scores["nll"]: [*P], the negative log-likelihood to be learned, scaled so that its mean over the
    step's pairs is the mean over its tokens. batch["pair_weights"], ["chosen_tokens"],
    ["rejected_tokens"]: [*P]. weight_sum: the pairs of the whole step. Metrics: those of pairs,
    with beta times mean log-probabilities as rewards; nll, log_odds_ratio.

    >>> half = jnp.log(jnp.array([0.5, 0.25]))
    >>> scores = {"chosen": half[:1], "rejected": half[1:], "nll": -half[:1]}
    >>> batch = {k: jnp.ones(1) for k in ("pair_weights", "chosen_tokens", "rejected_tokens")}
    >>> value, _ = orpo(scores, batch, jnp.array(1.0), beta=1.0)  # log 2 + log(4/3): odds 1, 1/3
    >>> round(float(value), 4)
    0.9808
    """
    weights, chosen, rejected = _means(scores, batch)
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    nll, ratio = jnp.where(weights > 0, scores["nll"], 0.0), log_sigmoid(odds)
    losses = nll - beta * ratio
    metrics = pair_metrics(losses, beta * chosen, beta * rejected, weights)
    metrics |= {
        name: ((jax.lax.stop_gradient(value) * weights).sum(), weights.sum())
        for name, value in (("nll", nll), ("log_odds_ratio", ratio))
    }
    return (losses * weights).sum() / weight_sum, metrics


def cpo(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
    nll_weight: float = 1.0,
) -> tuple[Float[Array, ""], Metrics]:
    r"""CPO (https://arxiv.org/abs/2401.08417, Eq. 3): $-\log\sigma(\beta(\log p_w - \log p_l))$ and
    nll_weight times the NLL of the chosen answers.

    loss: sigmoid, hinge, ipo, or simpo (https://arxiv.org/abs/2405.14734, Eq. 6): mean
    log-probabilities a token, and a margin of gamma; ipo takes means too. alpha above or below 0
    makes rewards $(1 - p^{-\alpha})/\alpha$ of log p (AlphaPO, https://arxiv.org/abs/2501.03884).
    label_smoothing: of sigmoid and simpo. scores, batch, weight_sum and metrics as of `orpo`; "nll"
    is read where nll_weight is not 0. ValueError for settings that mean nothing.

    >>> scores = {"chosen": jnp.array([-2.0]), "rejected": jnp.array([-8.0])}
    >>> batch = {"pair_weights": jnp.ones(1)}
    >>> batch |= {"chosen_tokens": jnp.array([2.0]), "rejected_tokens": jnp.array([4.0])}
    >>> value, _ = simpo(scores, batch, jnp.array(1.0), beta=2.0, gamma=1.0)  # 2 * (2 - 1) - 1
    >>> round(float(value), 4)
    0.3133
    """
    _check(loss, beta, label_smoothing)
    if loss in ("ipo", "simpo"):
        weights, chosen, rejected = _means(scores, batch)
    else:
        weights, chosen, rejected = _read(scores, batch)
    if alpha != 0:
        chosen, rejected = ((1 - jnp.exp(-alpha * x)) / alpha for x in (chosen, rejected))
    margin = beta * (chosen - rejected) - (gamma if loss == "simpo" else 0.0)
    if loss == "hinge":
        losses = jax.nn.relu(1 - margin)
    elif loss == "ipo":
        losses = (margin / beta - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * log_sigmoid(margin)
        losses -= label_smoothing * log_sigmoid(-margin)
    metrics = {}
    if nll_weight != 0:
        nll = jnp.where(weights > 0, scores["nll"], 0.0)
        losses += nll_weight * nll
        metrics["nll"] = ((jax.lax.stop_gradient(nll) * weights).sum(), weights.sum())
    metrics |= pair_metrics(losses, beta * chosen, beta * rejected, weights)
    return (losses * weights).sum() / weight_sum, metrics


simpo = partial(cpo, loss="simpo", beta=2.0, gamma=1.0, nll_weight=0.0)


def _check(loss: str, beta: float, label_smoothing: float) -> None:
    if loss not in CPO_LOSSES:
        raise ValueError(f"loss '{loss}' is not one of {', '.join(CPO_LOSSES)}")
    if beta <= 0:
        raise ValueError(f"beta must be above 0, not {beta}")
    if label_smoothing and loss in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing is of the losses sigmoid and simpo, not of {loss}")


def _read(scores: dict[str, Array], batch: dict[str, Array]) -> tuple[Array, Array, Array]:
    """(weights, chosen, rejected); -1 where there is no pair: odds of probability 1 are none."""
    weights = batch["pair_weights"]
    chosen, rejected = (jnp.where(weights > 0, scores[n], -1.0) for n in ("chosen", "rejected"))
    return weights, chosen, rejected


def _means(scores: dict[str, Array], batch: dict[str, Array]) -> tuple[Array, Array, Array]:
    """The same, of means over tokens."""
    weights, chosen, rejected = _read(scores, batch)
    chosen = chosen / jnp.maximum(batch["chosen_tokens"], 1.0)
    return weights, chosen, rejected / jnp.maximum(batch["rejected_tokens"], 1.0)


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) of x < 0, by whichever form keeps its digits (M. Maechler, 2012); at 0, which
    a probability of 1 rounds to, the largest finite logarithm stands for minus infinity."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
