"""Losses: arrays in, (scalar, {name: (sum, count)}) out. No model, no config."""

from mud_puppy.losses.distillation import distill, generalized_jsd, top_k_jsd
from mud_puppy.losses.kto import kto
from mud_puppy.losses.preference import dpo, ipo
from mud_puppy.losses.reference_free import cpo, orpo, simpo
from mud_puppy.losses.reward import process_reward, reward, reward_regression
from mud_puppy.losses.sft import sft

__all__ = [
    "cpo",
    "distill",
    "dpo",
    "generalized_jsd",
    "ipo",
    "kto",
    "orpo",
    "process_reward",
    "reward",
    "reward_regression",
    "sft",
    "simpo",
    "top_k_jsd",
]
