"""What the losses of answer pairs share: the pairs, and the metrics that all of them report.

A pair is a prompt with a chosen and a rejected answer. Its scores are log-probabilities of whole
answers (sums over tokens, natural logarithm, float32) of any one shape P; a pair of weight 0 is
filling and has no effect.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Pairs:
    """Log-ratios log(policy / reference) of the answers, their tokens, and the pairs' weights;
    margin, reference_margin: log-probability of the chosen answer less that of the rejected one."""

    chosen: Float[Array, "*P"]
    rejected: Float[Array, "*P"]
    chosen_tokens: Float[Array, "*P"]
    rejected_tokens: Float[Array, "*P"]
    margin: Float[Array, "*P"]
    reference_margin: Float[Array, "*P"]
    weights: Float[Array, "*P"]


def read_pairs(scores: dict[str, Float[Array, "*P"]], batch: dict[str, Array]) -> Pairs:
    """scores: "chosen", "rejected", "reference_chosen" and "reference_rejected"; batch:
    "pair_weights", "chosen_tokens" and "rejected_tokens". No gradient reaches the reference."""
    weights = batch["pair_weights"]
    # Filling may hold anything; zeros keep its losses and gradients finite.
    chosen, rejected, *reference = (
        jnp.where(weights > 0, scores[name], 0.0)
        for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")
    )
    other_chosen, other_rejected = map(jax.lax.stop_gradient, reference)
    return Pairs(
        chosen=chosen - other_chosen,
        rejected=rejected - other_rejected,
        chosen_tokens=jnp.maximum(batch["chosen_tokens"], 1.0),
        rejected_tokens=jnp.maximum(batch["rejected_tokens"], 1.0),
        margin=chosen - rejected,
        reference_margin=other_chosen - other_rejected,
        weights=weights,
    )


def pair_metrics(
    losses: Float[Array, "*P"],
    chosen_rewards: Float[Array, "*P"],
    rejected_rewards: Float[Array, "*P"],
    weights: Float[Array, "*P"],
) -> Metrics:
    """TRL's names: what dashboards know. Accuracy is how often the chosen reward is the larger."""
    count = weights.sum()
    chosen, rejected = map(jax.lax.stop_gradient, (chosen_rewards, rejected_rewards))
    found = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
    }
    return {name: ((value * weights).sum(), count) for name, value in found.items()}
