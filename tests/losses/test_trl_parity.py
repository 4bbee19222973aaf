"""Every loss and its gradient against TRL's own code, and each comparison's mutation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from mud_puppy import losses
from mud_puppy.losses.preference import DIVERGENCES, DIVERGENT, LOSSES, SMOOTHED
from tests.losses import trl_losses

P, T = 6, 9
Scores = dict[str, Any]


@pytest.fixture(scope="module")
def tokens() -> dict[str, np.ndarray]:
    """Log-probabilities a token [P, T], NaN beyond an answer, of policy and reference."""
    random = np.random.default_rng(0)
    lengths = {name: random.integers(2, T + 1, P) for name in ("chosen", "rejected")}
    found = {}
    for name, length in lengths.items():
        beyond = np.arange(T) >= length[:, None]
        for owner in ("", "reference_"):
            logps = -random.gamma(2.0, 0.4, (P, T))
            found[owner + name] = np.where(beyond, np.nan, logps).astype(np.float32)
    return found


def answers(tokens: dict[str, Any]) -> tuple[Scores, dict[str, Any]]:
    """Sums of tokens as our losses take them, with a pair of filling that must not be seen."""

    def sums(x: Any) -> Any:
        return jnp.append(jnp.where(jnp.isnan(x), 0.0, x).sum(-1), 7.0)

    scores = {name: sums(x) for name, x in tokens.items()}
    counts = {n: (~jnp.isnan(tokens[n])).sum(-1) for n in ("chosen", "rejected")}
    # The mean over pairs of the NLL is that over the chosen answers' tokens.
    scores["nll"] = -scores["chosen"] * P / counts["chosen"].sum()
    batch = {f"{n}_tokens": jnp.append(c, 0).astype(jnp.float32) for n, c in counts.items()}
    batch["pair_weights"] = jnp.append(jnp.ones(P), 0.0)
    return scores, batch


def ours(compute: Callable, tokens: dict[str, Any], **settings: Any) -> tuple[float, Any]:
    """The loss and its gradient by the tokens of the policy, [2, P, T]."""

    def value(chosen: Any, rejected: Any) -> Any:
        scores, batch = answers(tokens | {"chosen": chosen, "rejected": rejected})
        return compute(scores, batch, batch["pair_weights"].sum(), **settings)[0]

    found, grads = jax.value_and_grad(value, (0, 1))(tokens["chosen"], tokens["rejected"])
    return float(found), np.nan_to_num(np.stack(grads))


def theirs(compute: Callable, tokens: dict[str, Any]) -> tuple[float, Any]:
    """compute(chosen, rejected) of torch tensors [P, T] -> a scalar; and its gradient."""
    own = [torch.tensor(tokens[n], requires_grad=True) for n in ("chosen", "rejected")]
    found = compute(*own)
    found.backward()
    return found.item(), np.stack([np.nan_to_num(x.grad.numpy()) for x in own])


def equal(one: tuple[float, Any], other: tuple[float, Any], bound: float = 1e-5) -> bool:
    (value, grad), (wanted, wanted_grad) = one, other
    size = np.abs(wanted_grad).max()
    assert size > 0
    close = abs(value - wanted) <= bound * max(1.0, abs(wanted))
    return close and np.abs(grad - wanted_grad).max() <= bound * max(1.0, size)


def trl_dpo(tokens: dict[str, Any], **settings: Any) -> tuple[float, Any]:
    def compute(chosen: Any, rejected: Any) -> Any:
        reference = [
            torch.tensor(np.nansum(tokens[f"reference_{n}"], -1)) for n in ("chosen", "rejected")
        ]
        return trl_losses.dpo(chosen, rejected, tuple(reference), **settings)[0]

    return theirs(compute, tokens)


DPO = {
    **{name: {"loss": {name: 1.0}, "label_smoothing": 0.1 * (name in SMOOTHED)} for name in LOSSES},
    "sigmoid": {"loss": {"sigmoid": 1.0}},
    "sft": {"loss": {"sft": 1.0}},
    "mixed": {"loss": {"sigmoid": 0.8, "bco_pair": 1.0, "sft": 0.2}},
    **{
        f"{name} {divergence}": {
            "loss": {name: 1.0},
            "divergence": divergence,
            "label_smoothing": 1e-3 * (name == "exo_pair"),
        }
        for name in sorted(DIVERGENT - {"sft"})
        for divergence in DIVERGENCES[1:]
    },
    "alpha 1.7": {"loss": {"sigmoid": 1.0}, "divergence": "alpha_divergence", "alpha": 1.7},
    "alpha 1": {"loss": {"sigmoid": 1.0}, "divergence": "alpha_divergence", "alpha": 1.0},
    "tau": {"loss": {"discopop": 1.0}, "discopop_tau": 0.5},
}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("case", DPO)
def test_dpo(case: str, beta: float, tokens: dict[str, Any]) -> None:
    settings = DPO[case] | {"beta": beta}
    wanted = trl_dpo(tokens, **settings)
    assert equal(ours(losses.dpo, tokens, **settings), wanted)
    if case != "sft":  # which has no beta
        assert not equal(ours(losses.dpo, tokens, **settings | {"beta": 1.1 * beta}), wanted)


@pytest.mark.parametrize("name", [*LOSSES, "sft"])
def test_each_is_a_loss_of_its_own(name: str, tokens: dict[str, Any]) -> None:
    settings = DPO[name] | {"beta": 0.7}
    wanted = trl_dpo(tokens, **settings)
    for other in {*LOSSES, "sft"} - {name}:
        changed = settings | {"loss": {other: 1.0}, "label_smoothing": 0.1 * (other in SMOOTHED)}
        assert not equal(ours(losses.dpo, tokens, **changed), wanted), other


def test_metrics_are_trls(tokens: dict[str, Any]) -> None:
    own = [torch.tensor(tokens[n]) for n in ("chosen", "rejected")]
    reference = [
        torch.tensor(np.nansum(tokens[f"reference_{n}"], -1)) for n in ("chosen", "rejected")
    ]
    _, wanted = trl_losses.dpo(*own, tuple(reference), loss={"sigmoid": 1.0}, beta=0.3)
    scores, batch = answers(tokens)
    _, found = losses.dpo(scores, batch, jnp.float32(P), beta=0.3)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        total, count = found[f"rewards/{name}"]
        assert float(total / count) == pytest.approx(wanted[f"rewards/{name}"][0], abs=1e-5)


@pytest.mark.parametrize("labels", ["mixed", "good", "bad"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto(loss: str, labels: str, tokens: dict[str, Any]) -> None:
    settings = {"loss": loss, "beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    good = {"mixed": np.arange(P) % 3 > 0, "good": np.ones(P, bool), "bad": np.zeros(P, bool)}[
        labels
    ]
    kl = [np.nansum(tokens[n], -1).astype(np.float32) for n in ("rejected", "reference_rejected")]
    kl[0] += 2.0  # so that the estimate is above 0
    reference = np.nansum(tokens["reference_chosen"], -1)

    def compute(chosen: Any, rejected: Any) -> Any:
        others = tuple(torch.tensor(x) for x in kl)
        given = torch.tensor(good), torch.tensor(reference), others
        return trl_losses.kto(chosen, *given, **settings) + 0 * rejected.nansum()

    def value(tokens: Any, shift: float) -> Any:
        scores, batch = answers({"chosen": tokens, "rejected": tokens})
        own = {"logps": scores["chosen"], "reference_logps": jnp.append(reference, 0.0)}
        own |= {
            "kl_logps": jnp.append(kl[0] + shift, 9.0),
            "reference_kl_logps": jnp.append(kl[1], 0.0),
        }
        weights = batch["pair_weights"]
        given = {"labels": jnp.append(good, True), "answer_weights": weights}
        return losses.kto(own, given, weights.sum(), **settings)[0]

    wanted, wanted_grad = theirs(compute, tokens)
    shifts = (0.0,) if loss == "apo_zero_unpaired" else (0.0, 0.1)
    for shift in shifts:
        found, grad = jax.value_and_grad(value)(tokens["chosen"], shift)
        same = equal((float(found), np.nan_to_num(grad)), (wanted, wanted_grad[0]))
        assert same == (shift == 0.0)


CPO = {
    "sigmoid": {"loss": "sigmoid", "beta": 0.2, "label_smoothing": 0.1},
    "hinge": {"loss": "hinge", "beta": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.2},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 1.1, "label_smoothing": 0.05},
    "alphapo": {"loss": "simpo", "beta": 2.0, "gamma": 0.4, "alpha": 0.25},
    "alphapo below 0": {"loss": "simpo", "beta": 2.0, "gamma": 0.4, "alpha": -0.5},
}


@pytest.mark.parametrize("nll_weight", [0.0, 1.0])
@pytest.mark.parametrize("case", CPO)
def test_cpo(case: str, nll_weight: float, tokens: dict[str, Any]) -> None:
    settings = CPO[case]

    def compute(chosen: Any, rejected: Any) -> Any:
        means = settings["loss"] in ("ipo", "simpo")
        own = [x.nanmean(-1) if means else x.nansum(-1) for x in (chosen, rejected)]
        nll = -chosen[~chosen.isnan()].mean()
        return trl_losses.cpo(*own, **settings) + nll_weight * nll

    wanted = theirs(compute, tokens)
    assert equal(ours(losses.cpo, tokens, **settings, nll_weight=nll_weight), wanted)
    other = settings | {"beta": 1.1 * settings["beta"]}
    assert not equal(ours(losses.cpo, tokens, **other, nll_weight=nll_weight), wanted)


def test_simpo_is_cpo_without_nll(tokens: dict[str, Any]) -> None:
    settings = {"loss": "simpo", "beta": 2.0, "gamma": 1.0, "nll_weight": 0.0}
    assert equal(ours(losses.simpo, tokens), ours(losses.cpo, tokens, **settings), 0.0)


def test_orpo(tokens: dict[str, Any]) -> None:
    def compute(chosen: Any, rejected: Any) -> Any:
        nll = -chosen[~chosen.isnan()].mean()
        return nll + trl_losses.orpo(chosen.nanmean(-1), rejected.nanmean(-1), 0.3)

    wanted = theirs(compute, tokens)
    assert equal(ours(losses.orpo, tokens, beta=0.3), wanted)
    assert not equal(ours(losses.orpo, tokens, beta=0.31), wanted)


@pytest.mark.parametrize("centering", [None, 0.02])
@pytest.mark.parametrize("margin", [False, True])
def test_reward(margin: bool, centering: float | None, tokens: dict[str, Any]) -> None:
    margins = np.linspace(-0.5, 1.0, P).astype(np.float32)

    def compute(chosen: Any, rejected: Any) -> Any:
        given = torch.tensor(margins) if margin else None
        return trl_losses.reward(chosen.nansum(-1), rejected.nansum(-1), given, centering)

    def loss(scores: Any, batch: Any, weight_sum: Any, shift: float = 0.0) -> Any:
        batch["margins"] = jnp.append(margins * margin, 3.0) + shift
        return losses.reward(scores, batch, weight_sum, centering=centering or 0.0)

    wanted = theirs(compute, tokens)
    assert equal(ours(loss, tokens), wanted)
    assert not equal(ours(loss, tokens, shift=0.1), wanted)


def test_regression_is_torchs_mse() -> None:
    random = np.random.default_rng(1)
    values, labels = random.normal(size=(2, P)).astype(np.float32)
    own = torch.tensor(values, requires_grad=True)
    wanted = torch.nn.functional.mse_loss(own, torch.tensor(labels))
    wanted.backward()
    weights = jnp.append(jnp.ones(P), 0.0)

    def value(values: Any, factor: float) -> Any:
        batch = {"labels": jnp.append(labels, 5.0), "answer_weights": weights}
        scores = {"values": factor * jnp.append(values, jnp.nan)}
        return losses.reward_regression(scores, batch, weights.sum())[0]

    for factor in (1.0, 1.1):
        found, grad = jax.value_and_grad(value)(values, factor)
        assert equal((found, grad), (wanted.item(), own.grad.numpy())) == (factor == 1.0)


def test_process_reward_is_torchs_cross_entropy() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=(2, T, 2)).astype(np.float32)
    labels, weights = random.integers(0, 2, (2, T)), random.integers(0, 2, (2, T))
    own = torch.tensor(logits, requires_grad=True)
    given = torch.tensor(np.where(weights, labels, -100)).flatten()
    wanted = torch.nn.functional.cross_entropy(own.reshape(-1, 2), given)
    wanted.backward()

    def value(logits: Any, labels: Any) -> Any:
        batch = {"labels": jnp.asarray(labels), "weights": jnp.float32(weights)}
        return losses.process_reward({"logits": logits}, batch, jnp.float32(weights.sum()))[0]

    for given in (labels, 1 - labels):
        found, grad = jax.value_and_grad(value)(jnp.asarray(logits), given)
        same = equal((float(found), np.asarray(grad)), (wanted.item(), own.grad.numpy()))
        assert same == (given is labels)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_distillation(beta: float, temperature: float) -> None:
    random = np.random.default_rng(1)
    student, teacher = random.normal(0, 2, (2, 2, T, 11)).astype(np.float32)
    weights = random.integers(0, 2, (2, T))
    own = torch.tensor(student, requires_grad=True)
    labels = torch.tensor(np.where(weights, 1, -100))
    wanted = GKDTrainer.generalized_jsd_loss(own, torch.tensor(teacher), labels, beta, temperature)
    wanted.backward()

    def value(student: Any, beta: float) -> Any:
        divergence = losses.generalized_jsd(student, jnp.asarray(teacher), beta, temperature)
        batch = {"weights": jnp.float32(weights)}
        return losses.distill({"divergence": divergence}, batch, jnp.float32(weights.sum()))[0]

    for other in (beta, abs(beta - 0.05)):
        found, grad = jax.value_and_grad(value)(jnp.asarray(student), other)
        same = equal((float(found), np.asarray(grad)), (wanted.item(), own.grad.numpy()))
        assert same == (other == beta)
