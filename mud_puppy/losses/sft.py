"""Supervised fine-tuning: cross-entropy on the tokens that carry weight."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, tuple[Array, Array]]


def sft(
    scores: dict[str, Float[Array, "B T"]],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    r"""Negative log-likelihood: $-\sum_{bt} w_{bt} \log p(y_{bt}) / W$.

    scores["logps"], scores["entropy"]: float32 [B, T]; batch["weights"]: float32 [B, T], 0 where a
    token is not trained on (prompt, padding): such a token has no effect. `weight_sum` W is the
    sum of weights over the whole step's batch, so that parts of a batch add up to its loss.
    Metrics are (sum, count): loss, and the entropy of the predictions.

    >>> import jax.numpy as jnp
    >>> scores = {"logps": jnp.array([[-1.0, -3.0, -9.0]]), "entropy": jnp.zeros((1, 3))}
    >>> loss, metrics = sft(scores, {"weights": jnp.array([[1.0, 1.0, 0.0]])}, jnp.array(2.0))
    >>> float(loss)
    2.0
    """
    weights = batch["weights"]
    logps, entropies = (jnp.where(weights != 0, scores[name], 0.0) for name in ("logps", "entropy"))
    total = -(logps * weights).sum()
    entropy = (entropies * weights).sum()
    count = weights.sum()
    return total / weight_sum, {"loss": (total, count), "entropy": (entropy, count)}
