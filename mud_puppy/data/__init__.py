"""Rows of files and hub data sets to batches of tokens with loss weights. numpy only: no jax, no
model.

read_rows -> encode -> split -> Loader -> prefetch; preview_text shows what is trained on.
"""

from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.example import BadRows, Dataset, Example, Report, split
from mud_puppy.data.formats import Chat, Row, Text, Turn, convert
from mud_puppy.data.loader import (
    Batch,
    Loader,
    batch_size_for,
    collate_sft,
    padded_length,
    prefetch,
    row_length,
)
from mud_puppy.data.packing import efficiency, pack
from mud_puppy.data.preview import preview_text
from mud_puppy.data.rows import Rows, read_rows

__all__ = [
    "BadRows",
    "Batch",
    "Chat",
    "Dataset",
    "EncodeOptions",
    "Example",
    "Loader",
    "Report",
    "Row",
    "Rows",
    "Text",
    "Turn",
    "batch_size_for",
    "collate_sft",
    "convert",
    "efficiency",
    "encode",
    "pack",
    "padded_length",
    "prefetch",
    "preview_text",
    "read_rows",
    "row_length",
    "split",
]
