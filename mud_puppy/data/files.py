"""Lines of data files, each with its place: `(where, value)`, where a value that cannot be read is
a UserError.

One generator for each kind of file, and one for a data set of the hub. They parse, and judge
nothing else: what a row must hold is `formats.py`. An error in one line is yielded, so that the
reader can go on; an error of the whole file is raised.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError

Line = tuple[str, Any]
CSV_FIELD_CHARACTERS = 2**31 - 1
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def read_jsonl(path: Path) -> Iterator[Line]:
    """One JSON value a line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield where, json.loads(text.rstrip())
            except UnicodeDecodeError as error:
                yield where, _not_utf8(where, error)
            except (ValueError, RecursionError) as error:
                yield where, _not_json(where, error)


def read_json(path: Path) -> Iterator[Line]:
    """The elements of one JSON array, one JSON object, or (as many .json files are) JSON lines."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        return _elements(path, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return read_jsonl(path)
    return iter([(f"{path}:1", value)])


def _elements(path: Path, text: str) -> Iterator[Line]:
    """Each element of the array with the line it starts on; the first fault ends the array."""
    decoder = json.JSONDecoder()
    at, line, counted = _blank(text, text.index("[") + 1), 1, 0
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield where, _not_json(where, error)
            return
        yield where, value
        at = _blank(text, at)
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            where = f"{path}:{line}"
            yield where, UserError(f"{where}: not JSON: expected , or ] after the row")
            return
        at = _blank(text, at + 1)


def read_text(path: Path) -> Iterator[Line]:
    """Each line that is not blank as a row of the text format."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield where, _not_utf8(where, error)
                continue
            if text.strip():
                yield where, {"text": text}


def read_csv(path: Path) -> Iterator[Line]:
    """Rows under a header line; `where` is the line on which a row starts."""
    limit = csv.field_size_limit(CSV_FIELD_CHARACTERS)
    try:
        # surrogateescape keeps bytes that are not UTF-8 until their row is known.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, csv.reader(file, strict=True))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, reader: Any) -> Iterator[Line]:
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, UserError(f"{where}: not CSV: {error}")
            continue
        if not cells:
            continue
        broken = any(ESCAPED_BYTE.search(cell) for cell in cells)
        if header is None:
            if broken or len(set(cells)) < len(cells):
                raise UserError(f"{where}: a header must be UTF-8, with no name twice")
            header = cells
        elif broken:
            yield where, UserError(f"{where}: not UTF-8; save the file as UTF-8")
        elif len(cells) != len(header):
            what = f"{len(cells)} fields where the header has {len(header)}"
            yield where, UserError(f"{where}: {what}")
        else:
            yield where, dict(zip(header, cells, strict=True))


def read_parquet(path: Path) -> Iterator[Line]:
    """Rows of a parquet file; `where` counts rows from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet files need: pip install 'mud_puppy[hub]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file: {_first_line(error)}") from error


def read_hub(name: str, split: str) -> Iterator[Line]:
    """Rows of the hub data set `owner/name` or `owner/name:config`; `where` is `name:row`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: data sets of the hub need: pip install 'mud_puppy[hub]'"
        ) from error
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's kinds
        what = _first_line(error)
        raise UserError(
            f"{name} is no local file, and the hub does not give it (split {split}): {what}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".txt": read_text,
}


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}:{line}", error) from error


def _blank(text: str, at: int) -> int:
    """The first place from `at` that holds no white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{where}: not UTF-8: byte 0x{byte:02x}; save the file as UTF-8")


def _not_json(where: str, error: ValueError | RecursionError) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{where}: not JSON: {error.msg} (column {error.colno})")
    return UserError(f"{where}: not usable JSON: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
