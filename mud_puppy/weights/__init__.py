"""Weights: leaf types, the linear dispatch, and the transforms `params -> params`."""

from mud_puppy.weights.adapter import check_savable, load_adapter, save_adapter
from mud_puppy.weights.leaf import Lora, base_of, is_weight
from mud_puppy.weights.linear import dense, embed, linear, linears
from mud_puppy.weights.lora import (
    add_lora,
    freeze_lora,
    match_targets,
    merge_lora,
    strip_lora,
    with_dropout,
)
from mud_puppy.weights.tree import combine, module_names, partition

__all__ = [
    "Lora",
    "add_lora",
    "base_of",
    "check_savable",
    "combine",
    "dense",
    "embed",
    "freeze_lora",
    "is_weight",
    "linear",
    "linears",
    "load_adapter",
    "match_targets",
    "merge_lora",
    "module_names",
    "partition",
    "save_adapter",
    "strip_lora",
    "with_dropout",
]
