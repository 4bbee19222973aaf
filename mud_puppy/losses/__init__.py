"""Losses: arrays in, (scalar, {name: (sum, count)}) out. No model, no config."""

from mud_puppy.losses.sft import sft

__all__ = ["sft"]
