"""The families: which leaves a decoder has, what Hugging Face calls them, how its config reads.

A family is an entry of `tables.FAMILIES`, not a class: what of an `Arch` differs from llama's, and
which modules a block has. `rows(arch)` maps each of our paths to a `Row`; loading, saving, adapters
and sharding all read the same row. `read_config` makes an `Arch` of a transformers config.
"""

from mud_puppy.model.families.config import read_config
from mud_puppy.model.families.heads import HEADS, head_of, with_head
from mud_puppy.model.families.rows import Row, is_buffer, is_left_out, rows
from mud_puppy.model.families.tables import FAMILIES

__all__ = [
    "FAMILIES",
    "HEADS",
    "Row",
    "head_of",
    "is_buffer",
    "is_left_out",
    "read_config",
    "rows",
    "with_head",
]
