"""Losses of reward models: the better of two answers, how good one is, which steps are right."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from mud_puppy.losses.pairs import Metrics, pair_metrics


def reward(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
    *,
    centering: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    r"""Bradley-Terry: $-\log\sigma(s_w - s_l - m)$, with a margin m a pair
    (https://arxiv.org/abs/2307.09288, Eq. 2) and `centering` times $(s_w + s_l)^2$, which keeps
    rewards around 0 (https://arxiv.org/abs/2312.09244).

    scores["chosen"], ["rejected"]: rewards [*P]; batch["margins"], ["pair_weights"] (0 for
    filling): [*P]. weight_sum: the pairs of the whole step. Metrics: those of pairs.

    >>> scores = {"chosen": jnp.array([1.5]), "rejected": jnp.array([0.0])}
    >>> batch = {"pair_weights": jnp.ones(1), "margins": jnp.array([0.5])}
    >>> value, _ = reward(scores, batch, jnp.array(1.0))  # -log sigmoid(1)
    >>> round(float(value), 4)
    0.3133
    """
    weights = batch["pair_weights"]
    chosen, rejected = (jnp.where(weights > 0, scores[n], 0.0) for n in ("chosen", "rejected"))
    losses = -log_sigmoid(chosen - rejected - batch["margins"])
    losses += centering * (chosen + rejected) ** 2
    total = (losses * weights).sum() / weight_sum
    return total, pair_metrics(losses, chosen, rejected, weights)


def reward_regression(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    r"""Mean squared error of rewards against labels: $\sum_i w_i (s_i - y_i)^2 / W$.

    scores["values"], batch["labels"], batch["answer_weights"]: [*S]. weight_sum: the answers of the
    whole step. Metrics: loss and mae, the mean absolute error.

    >>> scores = {"values": jnp.array([1.0, 3.0])}
    >>> batch = {"labels": jnp.array([0.0, 1.0]), "answer_weights": jnp.ones(2)}
    >>> float(reward_regression(scores, batch, jnp.array(2.0))[0])
    2.5
    """
    weights = batch["answer_weights"]
    error = jnp.where(weights > 0, scores["values"] - batch["labels"], 0.0)
    total, count = (weights * error**2).sum(), weights.sum()
    off = (weights * jnp.abs(jax.lax.stop_gradient(error))).sum()
    return total / weight_sum, {"loss": (total, count), "mae": (off, count)}


def process_reward(
    scores: dict[str, Any], batch: dict[str, Array], weight_sum: Float[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    r"""Cross-entropy of a step's label (https://arxiv.org/abs/2305.20050), read at its last token.

    scores["logits"]: float32 [B, T, L]; batch["labels"]: int32 [B, T]; batch["weights"]: [B, T], 1
    at the ends of steps. weight_sum: the steps of the whole step's batch. Metrics: loss, accuracy.

    >>> scores = {"logits": jnp.array([[[0.0, 0.0], [0.0, 5.0]]])}
    >>> batch = {"labels": jnp.array([[1, 0]]), "weights": jnp.array([[1.0, 0.0]])}
    >>> round(float(process_reward(scores, batch, jnp.array(1.0))[0]), 4)  # log 2
    0.6931
    """
    weights, labels = batch["weights"], batch["labels"]
    logits = jnp.where(weights[..., None] != 0, scores["logits"], 0.0)
    logps = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(logps, labels[..., None], axis=-1)[..., 0]
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    total, count = (losses * weights).sum(), weights.sum()
    return total / weight_sum, {
        "loss": (total, count),
        "accuracy": ((right * weights).sum(), count),
    }
