r"""Distillation: the student's distribution over the vocabulary against a teacher's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.losses.pairs import Metrics


def generalized_jsd(
    student_logits: Float[Array, "*N V"],
    teacher_logits: Float[Array, "*N V"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, "*N"]:
    r"""$\beta\,KL(t\|m) + (1-\beta)\,KL(s\|m)$ with $m = \beta t + (1-\beta) s$, of each position
    (GKD, https://arxiv.org/abs/2306.13649, Eq. 1). beta 0 is KL(t || s), beta 1 is KL(s || t): the
    limits divided by beta and by 1 - beta. Logits are divided by `temperature` first.

    >>> even, other = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> round(float(generalized_jsd(other, even, beta=0.0)), 4)  # 0.5 log 2 + 0.5 log(2/3)
    0.1438
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in 0..1, not {beta}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    if beta in (0, 1):
        first, second = (teacher, student) if beta == 0 else (student, teacher)
        return _kl(first, second)
    mixture = jnp.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def distill(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """The mean of scores["divergence"] [B, T] (`generalized_jsd` at each position) over the tokens
    that batch["weights"] [B, T] names; weight_sum: their number in the whole step."""
    weights = batch["weights"]
    total = (scores["divergence"] * weights).sum()
    return total / weight_sum, {"loss": (total, weights.sum())}


def _kl(p: Array, q: Array) -> Array:
    """KL of log-probabilities; where p is 0 (its logarithm may be -inf) there is nothing to add."""
    terms = jnp.exp(p) * (jnp.where(jnp.isfinite(p), p, 0.0) - jnp.where(jnp.isfinite(p), q, 0.0))
    return terms.sum(-1)
