r"""Kahneman-Tversky optimization: answers that are good or bad by themselves, without a partner."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, Float

from mud_puppy.losses.pairs import Metrics

KINDS = ("kto", "apo_zero_unpaired")


def kto(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
    *,
    loss: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, ""], Metrics]:
    r"""KTO (https://arxiv.org/abs/2402.01306, Eq. 7): $1 - \sigma(\beta (r - z))$ of a good answer
    and $1 - \sigma(\beta (z - r))$ of a bad one, with r the log-ratio of policy and reference.

    z estimates KL(policy || reference) by answers that belong to other prompts: the mean of their
    log-ratios over the batch, at least 0, without a gradient. So the answers of a batch are
    coupled, and a batch in parts would have another loss. loss "apo_zero_unpaired" has z = 0
    (https://arxiv.org/abs/2408.06266, Eq. 7, of single answers) and couples nothing.

    scores["logps"], ["reference_logps"]: [*S], sums over an answer's tokens; scores["kl_logps"],
    ["reference_kl_logps"]: [*S], the same of the answers that z is estimated by, one beside each
    (neither for apo_zero_unpaired).
    batch["labels"]: [*S], 1 good or 0 bad; batch["answer_weights"]: [*S], 0 for filling.
    weight_sum: the answers of the whole step. Metrics: loss, kl, rewards/chosen and /rejected (beta
    times log-ratios of good and of bad answers). ValueError for an unknown loss.

    >>> one = jnp.ones(1)
    >>> scores = {"logps": -one, "reference_logps": -2 * one}
    >>> scores |= {"kl_logps": -3 * one, "reference_kl_logps": -3.5 * one}
    >>> batch = {"labels": one, "answer_weights": one}
    >>> value, _ = kto(scores, batch, jnp.array(1.0), beta=2.0)  # 1 - sigmoid(2 * (1 - 0.5))
    >>> round(float(value), 4)
    0.2689
    """
    if loss not in KINDS:
        raise ValueError(f"loss '{loss}' is not one of {', '.join(KINDS)}")
    weights, good = batch["answer_weights"], batch["labels"] > 0
    reference = jax.lax.stop_gradient(scores["reference_logps"])
    ratio = jnp.where(weights > 0, scores["logps"] - reference, 0.0)
    kl = estimate_kl(scores, weights) if loss == "kto" else jnp.float32(0)
    chosen = desirable_weight * (1 - sigmoid(beta * (ratio - kl)))
    rejected = undesirable_weight * (1 - sigmoid(beta * (kl - ratio)))
    losses = jnp.where(good, chosen, rejected) * weights
    rewards = beta * jax.lax.stop_gradient(ratio)
    metrics = {"loss": (losses.sum(), weights.sum()), "kl": (kl, jnp.float32(1))}
    for name, chosen in (("rewards/chosen", good), ("rewards/rejected", ~good)):
        own = weights * chosen
        metrics[name] = ((rewards * own).sum(), own.sum())
    return losses.sum() / weight_sum, metrics


def estimate_kl(scores: dict[str, Any], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """z: the mean of log(policy / reference) over answers to other prompts, at least 0."""
    ratio = jnp.where(weights > 0, scores["kl_logps"] - scores["reference_kl_logps"], 0.0)
    mean = (ratio * weights).sum() / jnp.maximum(weights.sum(), 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
