r"""Distillation: the student's distribution over the vocabulary against a teacher's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mud_puppy.losses.pairs import Metrics

NEVER = -1e9  # the logarithm of 0 in float32 sums, and finite
FLOOR = -100.0  # of the teacher's log-probabilities
LEAST = 2.0**-24  # the probability that float32 cannot tell from none beside 1


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


def top_k_jsd(
    student_logits: Float[Array, "*N V"],
    ids: Int[Array, "*N k"],
    teacher_logps: Float[Array, "*N k"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, "*N"]:
    r"""`generalized_jsd` of the student and a teacher of whom only k tokens are known at each
    position, over k + 1 events: each of those tokens, and any other token.

    `ids` are tokens in [0, V), each once, or -1 for none; `teacher_logps` their log-probabilities,
    of logits divided by `temperature`. Joining events never makes a divergence larger, so that this
    is at most `generalized_jsd`, and with k = V, where there is no other token, it is that.

    >>> even, logps = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25]))
    >>> round(float(top_k_jsd(even, jnp.array([0]), logps, beta=0.0)), 4)  # as above: 1/4, 3/4
    0.1308
    """
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    known = ids >= 0
    own = jnp.where(known, jnp.take_along_axis(student, jnp.where(known, ids, 0), -1), NEVER)
    # No log of 0: a reverse divergence would be infinite.
    theirs = jnp.where(known, jnp.maximum(teacher_logps.astype(jnp.float32), FLOOR), NEVER)
    if ids.shape[-1] < student.shape[-1]:
        # Summed, and not 1 - p, which has no digits left where p is almost 1.
        outside = jnp.where(known, ids, student.shape[-1])
        others = jnp.put_along_axis(student, outside, NEVER, axis=-1, inplace=False, mode="drop")
        own = _with(own, jax.nn.logsumexp(others, axis=-1))
        rest = 1 - jnp.exp(theirs).sum(-1)
        theirs = _with(theirs, jnp.log(jnp.maximum(rest, LEAST)))
    return generalized_jsd(own, theirs, beta)


def _with(logps: Float[Array, "*N k"], other: Float[Array, "*N"]) -> Float[Array, "*N k+1"]:
    return jnp.concatenate([logps, other[..., None]], axis=-1)


def distill(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
    sft: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """The mean of scores["divergence"] [B, T] (`generalized_jsd` at each position) over the tokens
    that batch["weights"] [B, T] names; weight_sum: their number in the whole step. sft: weight of
    the mean negative log-likelihood, of scores["logps"] [B, T], beside it (Axolotl's kd_ce_alpha).
    """
    weights = batch["weights"]
    count = weights.sum()
    divergence = (jnp.where(weights != 0, scores["divergence"], 0.0) * weights).sum()
    if not sft:
        return divergence / weight_sum, {"loss": (divergence, count)}
    nll = -(jnp.where(weights != 0, scores["logps"], 0.0) * weights).sum()
    total = divergence + sft * nll
    parts = {"divergence": (divergence, count), "nll": (nll, count)}
    return total / weight_sum, {"loss": (total, count)} | parts


def _kl(p: Array, q: Array) -> Array:
    """KL of log-probabilities; where p is 0 (its logarithm may be -inf) there is nothing to add."""
    terms = jnp.exp(p) * (jnp.where(jnp.isfinite(p), p, 0.0) - jnp.where(jnp.isfinite(p), q, 0.0))
    return terms.sum(-1)
