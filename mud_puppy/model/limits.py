"""Sizes in a config.json that no model has, refused before anything is built from them.

transformers makes a list entry for each layer and a label for each of `num_labels`, we a number for
each pair of a head: 10^9 of them is a process that hangs and then takes all memory.
"""

import re
from typing import Any

from mud_puppy.errors import UserError

# (names of fields, the largest value). The largest models there are have 126 layers, 1024 experts,
# a width of 53,248 and a vocabulary of 262,208.
_LIMITS = (
    (re.compile(r"(num|n)_(\w+_)?layers?|max_window_layers"), 10_000),
    (re.compile(r"(num|n)_(?!positions|ctx)\w+|\w*(_dim|_heads?|_rank|_experts)"), 65_536),
    (re.compile(r"hidden_size|n_embd|d_model"), 2**20),
    (re.compile(r"\w*_size|n_inner|d_ff"), 2**24),
)


def check_sizes(fields: dict[str, Any], where: str) -> None:
    """UserError for a number of layers, heads, experts, ... that is beyond any model's."""
    for name, value in fields.items():
        if isinstance(value, dict):
            check_sizes(value, where)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        limit = next((limit for names, limit in _LIMITS if names.fullmatch(name)), None)
        if limit is not None and not value <= limit:
            raise UserError(
                f"{where}: {name} {value} is beyond any model's (the limit is {limit}); refused, "
                "because building it would take all memory: download the model again"
            )
