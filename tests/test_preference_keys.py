"""Keys of preference tuning and reward models: names, factors, what has no effect or no meaning."""

from typing import Any

import pytest

from mud_puppy import losses
from mud_puppy.config import Config, preference
from mud_puppy.config.preference import parse_losses
from mud_puppy.errors import UserError
from mud_puppy.losses.kto import KINDS
from mud_puppy.losses.preference import COUPLED, DIVERGENCES, DIVERGENT, LOSSES, SMOOTHED

BASE = {"model": "m", "dataset": "d", "output": "o", "method": "preference"}


def test_names_are_those_of_the_losses() -> None:
    assert {*preference.DPO} == {*LOSSES, "sft"}
    assert preference.KTO == KINDS
    assert SMOOTHED | {"cpo", "simpo"} == preference.SMOOTHED
    assert preference.DIVERGENT == DIVERGENT
    assert COUPLED | {"kto"} == preference.COUPLED
    assert preference.Divergence.__args__ == DIVERGENCES
    assert all(callable(getattr(losses, name)) for name in preference.REFERENCE_FREE)


@pytest.mark.parametrize(
    ("value", "found", "text"),
    [
        ("dpo", {"sigmoid": 1.0}, "dpo"),
        ("sigmoid", {"sigmoid": 1.0}, "dpo"),
        ("simpo", {"simpo": 1.0}, "simpo"),
        ("sigmoid=0.8, sft=0.2", {"sigmoid": 0.8, "sft": 0.2}, "sigmoid=0.8,sft=0.2"),
        ({"dpo": 0.8, "bco_pair": 1}, {"sigmoid": 0.8, "bco_pair": 1.0}, "sigmoid=0.8,bco_pair=1"),
        ("ipo=2", {"ipo": 2.0}, "ipo=2"),
    ],
)
def test_losses_and_their_factors(value: Any, found: Any, text: str) -> None:
    config = Config.load(BASE | {"preference": value})
    assert (config.losses, config.preference) == (found, text)
    assert Config.load(config.to_dict()) == config
    assert parse_losses(text) == found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("simop", "losses are dpo, .* Did you mean 'simpo'"),
        ("kto=1,ipo=1", "kto stands alone"),
        ("sft", "sft alone has no use for the rejected answers"),
        ("ipo=0", "the factor of ipo must be above 0"),
        ("dpo,sigmoid", "sigmoid stands twice"),
        ("ipo=much", "could not convert"),
        (3, "is not a loss"),
        ({}, "there is none"),
    ],
)
def test_losses_that_mean_nothing(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Config.load(BASE | {"preference": value})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "lora", "preference": "dpo"}, "preference needs method preference"),
        ({"method": "lora", "tune": "full"}, "tune needs method preference, rm, prm"),
        ({"reference": "int8"}, "reference needs .* tune full"),
        (
            {"tune": "full", "preference": "simpo", "reference": "int8"},
            "a loss against a reference",
        ),
        ({"preference": "hinge", "label_smoothing": 0.1}, "losses of aot, "),
        ({"preference": "kto", "ld_alpha": 0.5}, "a loss of pairs against a reference"),
        ({"preference": "nca_pair", "f_divergence": "forward_kl"}, "losses of discopop"),
        ({"preference": "sigmoid,bco_pair", "f_divergence": "forward_kl"}, "losses of discopop"),
        ({"preference": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ({"train_on_prompt": True}, "preference with orpo, cpo or sft"),
        ({"method": "rm", "train_on_prompt": True}, "preference with orpo, cpo or sft"),
        ({"f_alpha": 0.3}, "f_divergence alpha_divergence"),
        ({"preference": "kto", "gradient_accumulation": 2}, "kto compares the answers of a batch"),
        ({"preference": "aot", "gradient_accumulation": 2}, "aot compares the answers of a batch"),
        (
            {"preference": "kto", "batch_size": 1, "pack_sequences": False},
            "kto compares .* has one",
        ),
        ({"method": "rm", "reward": "labels", "reward_centering": 0.1}, "method rm on pairs"),
        ({"method": "rm", "sample_prompts": 2}, "a method that gives texts"),
        ({"precision": "fp8"}, "method preference has no float8 products"),
        ({"tune": "full", "lora_r": 8}, "lora_r needs a new adapter"),
        ({"tune": "lora", "quant_backend": "nf4"}, "quant_backend needs"),
        # 0 is a value of these like any other.
        ({"preference": "kto", "ld_alpha": 0}, "ld_alpha needs"),
        ({"method": "rm", "ld_alpha": 0}, "ld_alpha needs"),
        ({"cpo_alpha": 0}, "cpo_alpha needs method preference with cpo"),
        ({"simpo_gamma": 0}, "simpo_gamma needs method preference with simpo"),
        ({"desirable_weight": 0}, "desirable_weight needs method preference with kto"),
        ({"undesirable_weight": 0.0}, "undesirable_weight needs method preference with kto"),
        ({"f_alpha": 0}, "f_alpha needs f_divergence alpha_divergence"),
        ({"method": "rm", "roles_to_train": "assistant"}, "roles_to_train needs .* other than rm"),
        ({"method": "prm", "roles_to_train": "user"}, "roles_to_train needs .* other than rm"),
    ],
)
def test_keys_without_effect_are_refused(keys: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Config.load(BASE | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"ld_alpha": 0},
        {"preference": "cpo", "cpo_alpha": 0},
        {"preference": "simpo", "simpo_gamma": 0},
        {"preference": "kto", "desirable_weight": 0},
        {"preference": "orpo", "train_on_prompt": True, "roles_to_train": ["assistant", "tool"]},
        # Off, as they are by default.
        {"preference": "kto", "label_smoothing": 0, "simpo_alpha": 0, "shared_prefix": False},
        {"method": "prm", "reward_centering": 0, "beta": None, "train_on_prompt": False},
        {"method": "rm", "sample_prompts": 0},
    ],
)
def test_what_has_an_effect_or_is_off_is_taken(keys: Any) -> None:
    config = Config.load(BASE | keys)
    assert Config.load(config.to_dict()) == config


def test_rates_that_fit() -> None:
    def rate(**keys: Any) -> float:
        return Config.load(BASE | keys).learning_rate

    assert rate() == 2e-5 and rate(tune="full") == 1e-6
    assert rate(method="rm") == 1e-4 and rate(method="prm", tune="full") == 1e-5
    assert rate(method="lora") == 2e-4 and rate(method="full") == 2e-5
