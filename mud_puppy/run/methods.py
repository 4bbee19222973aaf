"""A method is data: what the model is asked, and the loss. What it reads is in `kinds.py`.

All methods share one step and one loop; a method that needs its own trainer is designed wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array

from mud_puppy import losses
from mud_puppy.config import Config
from mud_puppy.config.preference import KTO, REFERENCE_FREE
from mud_puppy.run.scores import (
    score_distilled,
    score_pairs,
    score_rated,
    score_rewards,
    score_steps,
    score_tokens,
)


@dataclass(frozen=True)
class Method:
    """score(model, params, reference, batch, run_layers) -> arrays by name, and "aux": the model's
    auxiliary sums {name: (sum, count)} (`Model.forward`), which are metrics and may be penalties;
    loss(scores, batch, weight_sum) -> (scalar, {name: (sum, count)}).

    unit: the array of the batch whose sum over the whole step is `weight_sum`: what the loss is a
    mean of. reference: whether the loss compares with the policy as it was, or with a teacher, and
    asks it in each step."""

    score: Callable[..., dict[str, Any]]
    loss: Callable[..., tuple[Array, dict[str, tuple[Array, Array]]]]
    unit: str = "weights"
    reference: bool = False


BETA, SIMPO_BETA = 0.1, 2.0  # where the config says none
SFT = Method(score_tokens, losses.sft)


def method_of(config: Config) -> Method:
    """What a run of this config trains with."""
    if config.method == "preference":
        return _preference(config)
    if config.method == "rm" and config.reward == "labels":
        return Method(score_rewards, losses.reward_regression, "answer_weights")
    if config.method == "rm":
        loss = partial(losses.reward, centering=config.reward_centering)
        return Method(score_rewards, loss, "pair_weights")
    if config.method == "prm":
        return Method(score_steps, losses.process_reward)
    if config.method == "distill":
        return _distillation(config)
    return SFT


def _distillation(config: Config) -> Method:
    score = partial(
        score_distilled,
        beta=config.distill_beta,
        temperature=config.distill_temperature,
        supervised=config.distill_sft > 0,
    )
    loss = partial(losses.distill, sft=config.distill_sft)
    return Method(score, loss, reference=config.asks_teacher)


def _preference(config: Config) -> Method:
    name, beta = next(iter(config.losses)), config.beta or BETA
    asked = config.reference != "cached"
    if name in KTO:
        loss = partial(
            losses.kto,
            loss=name,
            beta=beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        return Method(score_rated, loss, "answer_weights", reference=asked)
    if name in REFERENCE_FREE:
        return Method(score_pairs, _reference_free(config, name), "pair_weights")
    loss = partial(
        losses.dpo,
        loss=config.losses,
        beta=beta,
        label_smoothing=config.label_smoothing,
        divergence=config.f_divergence,
        alpha=config.f_alpha,
        discopop_tau=config.discopop_tau,
    )
    return Method(score_pairs, loss, "pair_weights", reference=asked)


def _reference_free(config: Config, name: str) -> Callable:
    if name == "orpo":
        return partial(losses.orpo, beta=config.beta or BETA)
    smoothing = config.label_smoothing
    if name == "simpo":
        return partial(
            losses.simpo,
            beta=config.beta or SIMPO_BETA,
            gamma=config.simpo_gamma,
            alpha=config.simpo_alpha,
            label_smoothing=smoothing,
        )
    beta, weight = config.beta or BETA, config.cpo_alpha
    return partial(losses.cpo, beta=beta, label_smoothing=smoothing, nll_weight=weight)
