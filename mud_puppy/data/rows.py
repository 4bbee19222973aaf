"""Rows of a data set, from a local file or the hub, checked one by one.

A source that looks like a path is a path: it is never looked up on the hub. Bad rows stop the
reading, or are counted and listed where the caller asks for that.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mud_puppy.data.files import READERS, Line, read_hub
from mud_puppy.data.formats import convert
from mud_puppy.data.report import SKIP_HINT, BadRows
from mud_puppy.errors import UserError, nearest_file

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
DATA_SUFFIXES = (*READERS, ".tsv", ".gz", ".zip", ".zst", ".xz", ".bz2", ".yaml", ".yml", ".arrow")


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that are sound (as `convert` made them), what was left out, and the columns that no
    format uses."""

    rows: tuple[Any, ...]
    bad: BadRows
    unused_columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(
    source: str | Path,
    on_bad_rows: str = "stop",
    split: str | None = None,
    convert: Callable[[Any, str], tuple[Any, frozenset[str]]] = convert,
) -> Rows:
    """Every row of `source`: a .jsonl, .json, .parquet, .csv or .txt file, else a data set of the
    hub.

    `split` names the hub's split (default train). `convert(value, where) -> (row, unused columns)`
    decides what a row must hold; the default knows the formats of supervised training. Raises
    UserError for a file that is missing, empty, of another kind or without a sound row, and for a
    bad row unless `on_bad_rows` is "skip".
    """
    if on_bad_rows not in ("stop", "skip"):
        raise UserError(f"on_bad_rows must be stop or skip, not {on_bad_rows!r}")
    rows: list[Any] = []
    faults: list[str] = []
    unused: set[str] = set()
    for where, value in _lines(str(source), split):
        try:
            if isinstance(value, UserError):
                raise value
            row, extra = convert(value, where)
        except UserError as error:
            if on_bad_rows == "stop":
                raise UserError(f"{error} {SKIP_HINT}") from None
            faults.append(str(error))
            continue
        rows.append(row)
        unused |= extra
    if faults and not rows:
        raise UserError(f"{source}: all {len(faults)} rows are bad; the first: {faults[0]}")
    if not rows:
        raise UserError(f"{source} holds no rows, so there is nothing to train on")
    bad = BadRows(len(faults)) + BadRows(0, tuple(faults))
    return Rows(tuple(rows), bad, tuple(sorted(unused)))


def _lines(source: str, split: str | None) -> Iterator[Line]:
    try:
        path = Path(source).expanduser()
        if not _is_local(source, path):
            return read_hub(source, split or "train")
        if not path.exists():
            raise UserError(f"{source} does not exist; check the path.{nearest_file(path)}")
        if path.is_dir():
            raise UserError(f"{source} is a folder; name the data file in it")
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"{source}: unknown kind of file; known are {', '.join(READERS)}")
        if split is not None:
            raise UserError(f"{source} is a file and has no split {split!r}; leave the split out")
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    return reader(path)


def _is_local(source: str, path: Path) -> bool:
    looks_local = source.startswith((".", "/", "~")) or path.suffix.lower() in DATA_SUFFIXES
    return looks_local or HUB_NAME.fullmatch(source) is None or path.exists()
