"""`top_k_jsd`: the divergence over k words and the rest, whose limit is all words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.losses import generalized_jsd, top_k_jsd

N, V, TEMPERATURE = 6, 23, 1.5
BETAS = (0.0, 0.3, 1.0)


def logits() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 2, (2, N, V)).astype(np.float32)
    return jnp.asarray(student), jnp.asarray(teacher)


def likeliest(teacher: Any, k: int) -> tuple[Any, Any]:
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(teacher / TEMPERATURE), k)
    return ids, logps


@pytest.mark.parametrize("beta", BETAS)
def test_all_words_are_the_whole_divergence(beta: float) -> None:
    student, teacher = logits()
    ids, logps = likeliest(teacher, V)

    def known(student: Any, logps: Any = logps) -> Any:
        return top_k_jsd(student, ids, logps, beta, TEMPERATURE).sum()

    def whole(student: Any) -> Any:
        return generalized_jsd(student, teacher, beta, TEMPERATURE).sum()

    for found, wanted in zip(
        *(jax.value_and_grad(f)(student) for f in (known, whole)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert abs(known(student, logps[:, ::-1]) - whole(student)) > 0.1  # another teacher


@pytest.mark.parametrize("beta", BETAS)
def test_fewer_words_say_less(beta: float) -> None:
    student, teacher = logits()
    whole = generalized_jsd(student, teacher, beta, TEMPERATURE)
    found = [top_k_jsd(student, *likeliest(teacher, k), beta, TEMPERATURE) for k in (1, 4, 22)]
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert (less <= more + 1e-4).all()
    assert (found[0] < 0.9 * whole).all()
    np.testing.assert_allclose(found[2], whole, rtol=1e-3)  # the rest is one word


@pytest.mark.parametrize("beta", BETAS)
def test_the_events_are_the_words_and_the_rest(beta: float) -> None:
    """By hand, of probabilities in float64."""
    student, teacher = logits()
    ids, logps = likeliest(teacher, 4)
    s = np.array(jax.nn.softmax(student / TEMPERATURE), np.float64)
    s = np.take_along_axis(s, np.asarray(ids), -1)
    t = np.exp(np.array(logps, np.float64))
    s, t = (np.append(x, 1 - x.sum(-1, keepdims=True), -1) for x in (s, t))
    m = {0.0: s, 1.0: t}.get(beta, beta * t + (1 - beta) * s)
    kl = [(p * np.log(p / m)).sum(-1) for p in (t, s)]
    wanted = kl[0] + kl[1] if beta in (0, 1) else beta * kl[0] + (1 - beta) * kl[1]
    found = top_k_jsd(student, ids, logps, beta, TEMPERATURE)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_no_token_and_no_probability_are_numbers(beta: float) -> None:
    """-1 has no effect, wherever it stands; a teacher that is sure gives finite slopes."""
    student, teacher = logits()
    ids, logps = likeliest(teacher, 4)
    gap = jnp.full((N, 1), -1)
    padded = jnp.concatenate([gap, ids], -1), jnp.concatenate([jnp.zeros((N, 1)), logps], -1)
    run = jax.value_and_grad(lambda s, i, t: top_k_jsd(s, i, t, beta, TEMPERATURE).sum())
    for found, wanted in zip(run(student, *padded), run(student, ids, logps), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    sure = jnp.where(jnp.arange(4) == 0, 0.0, -jnp.inf) * jnp.ones((N, 1))
    far = student.at[:, 0].set(200.0)
    for value in (*run(student, ids, sure), *run(far, ids, sure)):
        assert jnp.isfinite(value).all()
