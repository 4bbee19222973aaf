"""Held-out examples apart by their source, so that every figure of an evaluation is there for each.

A row, and a batch, then holds examples of one source alone: sums over the batches of a source are
its own, sums over all batches those of all. Shapes are those of one loader.
"""

import re
from collections import Counter
from collections.abc import Sequence

from mud_puppy.data.example import AnyExample, Example
from mud_puppy.data.loader import Loader, row_length
from mud_puppy.data.packing import pack

MOST = 20  # more sources than that are no figures that anyone reads
LONGEST = 40
NO_SOURCE, OTHERS = "no_source", "other_sources"


def source_names(examples: Sequence[AnyExample]) -> list[str]:
    """Of each example a name of its source that may stand in a metric's; all "" where fewer than
    two sources differ.

    Letters, digits, `-`, `_` and `.` are kept, runs of others become `_`, and what is longer than
    40 characters loses its middle; names that would be the same are numbered. Of more than 20
    sources the 19 with the most examples are named, the others together are `other_sources`.
    """
    sources = ["" if isinstance(one, Example) else one.source for one in examples]
    counts = Counter(sources)
    if len(counts) < 2:
        return [""] * len(examples)
    # The largest first; of equals the first in the alphabet.
    order = sorted(counts, key=lambda source: (-counts[source], source))
    named = order if len(order) <= MOST else order[: MOST - 1]
    names: dict[str, str] = {}
    for source in named:
        names[source] = _unlike(_plain(source), {OTHERS, *names.values()})
    return [names.get(source, OTHERS) for source in sources]


def rows_apart(
    examples: Sequence[AnyExample], max_seq_length: int, packed: bool
) -> list[list[int]] | None:
    """`Loader.bins` of one source each; None where there are not two sources."""
    names = source_names(examples)
    if not any(names):
        return None
    length = row_length(examples, max_seq_length, packed)
    rows = []
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        bins = (
            pack([examples[i].size for i in own], length)
            if packed
            else [[i] for i in range(len(own))]
        )
        rows += [[own[i] for i in chosen] for chosen in bins]
    return rows


def batches_apart(loader: Loader) -> list[tuple[str, list[int]]]:
    """(name, rows of `Loader.batch_of`) of the batches that show every example once, each of one
    source; names are "" where there are not two sources. ValueError where rows mix sources: the
    loader's `bins` must be those of `rows_apart`."""
    names = source_names(loader.examples)
    of_row = [names[row[0]] for row in loader.rows]
    if any(names[i] != name for row, name in zip(loader.rows, of_row, strict=True) for i in row):
        raise ValueError("a row holds examples of several sources; make the loader with rows_apart")
    need, found = loader.accumulation * loader.batch_size, []
    for name in dict.fromkeys(of_row):
        own = [r for r, other in enumerate(of_row) if other == name]
        found += [(name, own[i : i + need]) for i in range(0, len(own), need)]
    return found


def _plain(source: str) -> str:
    name = re.sub(r"[^-\w.]+", "_", source).strip("_") or NO_SOURCE
    half = (LONGEST - 2) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}..{name[-half:]}"


def _unlike(name: str, others: set[str]) -> str:
    numbered, number = name, 2
    while numbered in others:
        numbered, number = f"{name}_{number}", number + 1
    return numbered
