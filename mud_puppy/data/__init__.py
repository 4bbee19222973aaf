"""Rows of files and hub data sets to batches of tokens with loss weights. numpy only: no jax, no
model.

read_rows -> split -> encode -> Loader -> prefetch; preview_text shows what is trained on.
Preferences, ratings and rated steps have converters for read_rows, encode_* and collate_* of their
own.
"""

from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.example import (
    AnyExample,
    Dataset,
    Example,
    PairExample,
    RatedExample,
    StepsExample,
    TaughtExample,
    split,
)
from mud_puppy.data.fields import Turn
from mud_puppy.data.formats import Chat, Row, Text, convert
from mud_puppy.data.loader import (
    Batch,
    Loader,
    batch_size_for,
    collate_sft,
    collate_taught,
    padded_length,
    prefetch,
    row_length,
)
from mud_puppy.data.packing import efficiency, pack
from mud_puppy.data.preference_batches import (
    collate_pairs,
    collate_rated,
    collate_steps,
    kl_row_length,
)
from mud_puppy.data.preference_encoding import (
    STEP_SEPARATOR,
    encode_pairs,
    encode_rated,
    encode_steps,
)
from mud_puppy.data.preferences import (
    PairRow,
    RatedRow,
    StepsRow,
    convert_pair,
    convert_scored,
    convert_steps,
    convert_unpaired,
)
from mud_puppy.data.preview import preview_text
from mud_puppy.data.report import BadRows, Report
from mud_puppy.data.rows import Rows, read_rows
from mud_puppy.data.sources import batches_apart, rows_apart, source_names

__all__ = [
    "STEP_SEPARATOR",
    "AnyExample",
    "BadRows",
    "Batch",
    "Chat",
    "Dataset",
    "EncodeOptions",
    "Example",
    "Loader",
    "PairExample",
    "PairRow",
    "RatedExample",
    "RatedRow",
    "Report",
    "Row",
    "Rows",
    "StepsExample",
    "StepsRow",
    "TaughtExample",
    "Text",
    "Turn",
    "batch_size_for",
    "batches_apart",
    "collate_pairs",
    "collate_rated",
    "collate_sft",
    "collate_steps",
    "collate_taught",
    "convert",
    "convert_pair",
    "convert_scored",
    "convert_steps",
    "convert_unpaired",
    "efficiency",
    "encode",
    "encode_pairs",
    "encode_rated",
    "encode_steps",
    "kl_row_length",
    "pack",
    "padded_length",
    "prefetch",
    "preview_text",
    "read_rows",
    "row_length",
    "rows_apart",
    "source_names",
    "split",
]
