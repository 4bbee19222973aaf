"""The header of a safetensors file, checked before anything in it is believed.

Every byte of the data belongs to one tensor: no overlaps, no holes, nothing after the last; shapes,
dtypes and offsets agree. What passes cannot make a reader allocate more than the file holds.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.untrusted import MAX_JSON_BYTES, file_size, parse_json, shown

_MAX_RANK, _MAX_ELEMENTS = 32, 2**60  # numpy's limits are 64 dimensions and 2**63 bytes


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype's name, its shape, and bytes [start, end) counted from the file's."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, itemsizes: Mapping[str, int]) -> dict[str, Entry]:
    """Every tensor of a file by name. itemsizes: bytes of an element of each dtype that is known.

    UserError, with file and tensor, for a file that is cut short, corrupt, or made to mislead.
    """
    size = file_size(path)
    fields, start = _fields(path, size)
    fields.pop("__metadata__", None)
    entries = {
        name: _entry(path, name, value, start, size, itemsizes) for name, value in fields.items()
    }
    _check_cover(path, entries, start, size)
    return entries


def _fields(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """(the header's JSON, where the data begin)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise _broken(path, f"its header is said to have {length} bytes, the file {size}")
            if length > MAX_JSON_BYTES:
                raise _broken(path, f"a header of {length} bytes is more than any model's")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        fields = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _broken(path, f"its header is a {type(fields).__name__}, not an object")
    return fields, 8 + length


def _entry(
    path: Path, name: str, value: Any, start: int, size: int, itemsizes: Mapping[str, int]
) -> Entry:
    if not name.isprintable():  # it will stand in messages
        raise _broken(path, f"tensor {shown(name)} has a name that cannot be printed")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise _broken(path, f"tensor {shown(name)} has not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in itemsizes:
        raise UserError(
            f"{path}: tensor {shown(name)} is stored as {shown(str(dtype))}, which is not read; "
            f"dtypes that are: {', '.join(sorted(itemsizes))}"
        )
    if (
        not _counts(shape)
        or len(shape) > _MAX_RANK
        or prod(max(1, n) for n in shape) > _MAX_ELEMENTS
    ):
        raise _broken(path, f"tensor {shown(name)} has the shape {shown(str(shape))}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {shown(name)} has the offsets {shown(str(offsets))}")
    a, b = offsets
    if start + b > size:
        raise _broken(path, f"tensor {shown(name)} ends at byte {start + b}, the file at {size}")
    if prod(shape) * itemsizes[dtype] != b - a:
        what = f"{dtype} of shape {shown(str(shape))} in {b - a} bytes"
        raise _broken(path, f"tensor {shown(name)} is said to be {what}")
    return Entry(dtype, tuple(shape), start + a, start + b)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_cover(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """The tensors lie one after the other, from the data's first byte to the file's last."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    edge = [("", Entry("", (), start, start))]
    for (before, first), (name, entry) in pairwise(edge + ordered):
        if entry.start < first.end:
            both = f"tensors {shown(before)} and {shown(name)}"
            raise _broken(path, f"{both} overlap, from byte {entry.start} on")
        if entry.start > first.end:
            hole = f"bytes {first.end} to {entry.start}, before tensor {shown(name)}"
            raise _broken(path, f"{hole}, belong to no tensor")
    end = ordered[-1][1].end if ordered else start
    if end != size:
        raise _broken(path, f"{size - end} bytes after the last tensor belong to none")


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not a whole safetensors file ({what}); copy or download it again")
