"""What holds of every loss: examples by hand, parts that add up, filling, what is refused."""

import doctest
import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy import losses
from mud_puppy.losses.preference import COUPLED, LOSSES, SMOOTHED

MODULES = "sft preference kto reference_free reward distillation".split()
PAIRS = {
    **{n: partial(losses.dpo, loss=n, label_smoothing=0.1 * (n in SMOOTHED)) for n in LOSSES},
    **{f"cpo {n}": partial(losses.cpo, loss=n) for n in ("sigmoid", "hinge", "ipo", "simpo")},
    "sft": partial(losses.dpo, loss="sft"),
    "orpo": losses.orpo,
    "reward": partial(losses.reward, centering=0.1),
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_by_hand(name: str) -> None:
    module = importlib.import_module(f"mud_puppy.losses.{name}")
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


def pairs(count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    random = np.random.default_rng(count)

    def sums() -> Any:
        return jnp.asarray(-random.gamma(3.0, 1.0, count), jnp.float32)

    scores = {f"{o}{n}": sums() for o in ("", "reference_") for n in ("chosen", "rejected")}
    scores["nll"] = -sums()
    batch = {
        f"{n}_tokens": jnp.float32(random.integers(1, 9, count)) for n in ("chosen", "rejected")
    }
    return scores, batch | {"pair_weights": jnp.ones(count), "margins": jnp.full(count, 0.2)}


def part(arrays: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: x[rows] for name, x in arrays.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_parts_of_a_batch_add_up_unless_pairs_are_coupled(name: str) -> None:
    scores, batch = pairs(8)

    def value(rows: slice) -> Any:
        return PAIRS[name](part(scores, rows), part(batch, rows), jnp.float32(8))[0]

    apart = value(slice(0, 3)) + value(slice(3, 8))
    assert np.isclose(value(slice(0, 8)), apart, rtol=1e-5) == (name not in COUPLED)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("filling", [np.nan, np.inf, -np.inf, 0.0, 1e30])
def test_filling_has_no_effect(name: str, filling: float) -> None:
    scores, batch = pairs(5)

    def value(scores: Any, batch: Any) -> Any:
        return PAIRS[name](scores, batch, jnp.float32(5))

    filled = {n: jnp.insert(x, 2, filling) for n, x in scores.items()}
    weights = jnp.insert(batch["pair_weights"], 2, 0.0)
    more = {n: jnp.insert(x, 2, 0.0) for n, x in batch.items()} | {"pair_weights": weights}
    (wanted, metrics), grad = jax.value_and_grad(value, has_aux=True)(scores, batch)
    (found, other), with_filling = jax.value_and_grad(value, has_aux=True)(filled, more)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for n in scores:
        np.testing.assert_allclose(jnp.delete(with_filling[n], 2), grad[n], rtol=1e-5, atol=1e-7)
        assert with_filling[n][2] == 0
    for n, (total, count) in metrics.items():
        np.testing.assert_allclose(other[n][0] / other[n][1], total / count, rtol=1e-5, atol=1e-7)


TOKENS = {
    "sft": (losses.sft, {"logps": (), "entropy": ()}),
    "distill": (partial(losses.distill, sft=0.5), {"divergence": (), "logps": ()}),
    "process_reward": (losses.process_reward, {"logits": (2,)}),
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("filling", [np.nan, np.inf, -np.inf])
def test_tokens_without_weight_have_no_effect(name: str, filling: float) -> None:
    loss, shapes = TOKENS[name]
    weights = jnp.array([[1.0, 0.0, 1.0]])
    batch = {"weights": weights, "labels": jnp.array([[1, 0, 0]])}

    def value(scores: Any) -> Any:
        return loss(scores, batch, jnp.float32(2))

    rng = np.random.default_rng(0)
    scores = {n: jnp.float32(rng.normal(size=(1, 3, *own))) for n, own in shapes.items()}
    wanted = value(scores)
    filled = {n: x.at[:, 1].set(filling) for n, x in scores.items()}
    found, grad = jax.value_and_grad(value, has_aux=True)(filled)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert all(np.isfinite(x).all() and not x[:, 1].any() for x in grad.values())


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_gets_no_gradient(name: str) -> None:
    scores, batch = pairs(5)
    grads = jax.grad(lambda s: PAIRS[name](s, batch, jnp.float32(5))[0])(scores)
    assert not grads["reference_chosen"].any() and not grads["reference_rejected"].any()
    assert grads["chosen"].any() or grads["rejected"].any()


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_sorted_losses_do_not_see_the_order_of_pairs(name: str) -> None:
    scores, batch = pairs(7)
    order = np.random.default_rng(0).permutation(7)
    mixed = [{n: x[order] for n, x in arrays.items()} for arrays in (scores, batch)]
    found, wanted = (PAIRS[name](*own, jnp.float32(7))[0] for own in (mixed, (scores, batch)))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_pairs_may_have_any_shape() -> None:
    scores, batch = pairs(6)
    for name, loss in PAIRS.items():
        flat = loss(scores, batch, jnp.float32(6))[0]
        square = [{n: x.reshape(2, 3) for n, x in arrays.items()} for arrays in (scores, batch)]
        np.testing.assert_allclose(loss(*square, jnp.float32(6))[0], flat, rtol=1e-6, err_msg=name)


def test_sure_answers_have_finite_odds() -> None:
    """A probability of 1 has infinite odds: loss and gradient stay numbers."""
    scores, batch = pairs(2)
    scores["chosen"] = jnp.array([0.0, -1e-9])
    value, grads = jax.value_and_grad(lambda s: losses.orpo(s, batch, jnp.float32(2))[0])(scores)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in grads.values())


def test_kl_is_never_below_0_and_has_no_gradient() -> None:
    ones = jnp.ones(3)
    batch = {"labels": jnp.array([1.0, 0.0, 1.0]), "answer_weights": ones}

    def value(kl: Any) -> Any:
        scores = {"logps": -ones, "reference_logps": -2 * ones}
        return losses.kto(
            scores | {"kl_logps": kl, "reference_kl_logps": -ones}, batch, jnp.float32(3)
        )

    for shift, kl in ((-5.0, 0.0), (0.5, 1.5)):
        _, metrics = value(shift * ones)
        assert metrics["kl"][0] == kl
        assert not jax.grad(lambda kl: value(kl)[0])(shift * ones).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "sigmiod"}, "'sigmiod' is not one of sigmoid, "),
        ({"loss": {}}, "names none"),
        ({"beta": 0.0}, "beta must be above 0, not 0.0"),
        ({"divergence": "kl"}, "'kl' is not one of reverse_kl"),
        ({"loss": "nca_pair", "divergence": "forward_kl"}, "'nca_pair' has no forward_kl"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is of the losses aot, "),
        ({"label_smoothing": 0.5}, "below 0.5, not 0.5"),
        ({"loss": "exo_pair"}, "needs label_smoothing above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, words: str) -> None:
    scores, batch = pairs(2)
    with pytest.raises(ValueError, match=words):
        losses.dpo(scores, batch, jnp.float32(2), **settings)


@pytest.mark.parametrize(
    ("loss", "settings", "words"),
    [
        (losses.cpo, {"loss": "dpo"}, "'dpo' is not one of sigmoid, hinge"),
        (losses.cpo, {"beta": -1.0}, "beta must be above 0"),
        (losses.cpo, {"loss": "ipo", "label_smoothing": 0.1}, "not of ipo"),
        (losses.kto, {"loss": "dpo"}, "'dpo' is not one of kto, apo_zero_unpaired"),
    ],
)
def test_of_other_losses_too(loss: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss(*pairs(2), jnp.float32(2), **settings)


def test_distillation_of_outcomes_that_cannot_be() -> None:
    never = jnp.array([0.0, 0.0, -jnp.inf])
    even = jnp.array([0.0, 0.0, 0.0])
    for beta in (0.0, 0.5):
        value, grad = jax.value_and_grad(losses.generalized_jsd)(even, never, beta)
        assert np.isfinite(value) and np.isfinite(grad).all()
    for settings, words in (({"beta": 1.5}, "0..1"), ({"temperature": 0.0}, "above 0")):
        with pytest.raises(ValueError, match=words):
            losses.generalized_jsd(even, even, **settings)
