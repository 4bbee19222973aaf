"""What a GGUF file says of itself, held against the file before the gguf package reads it.

The package believes a length: of an array that claims 2^40 numbers it makes 2^40 empty ones behind
the end of the file. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf

from mud_puppy.model.untrusted import file_size, shown

# The package makes objects of 0.7 kB of each, two for a text; those of gemma's vocabulary of 2^18
# tokens with its merges are 2.1 million.
_MAX_ITEMS = 2_200_000
_MAX_NAME, _MAX_RANK = 4096, 4  # ggml's own limits are 64 bytes and 4 dimensions

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """ValueError, with the tensor or entry, where counts, lengths or offsets cannot be true;
    UserError for what is no file."""
    size = file_size(path)
    with path.open("rb") as file:
        walk = _Walk(file, size)
        tensors, entries = walk.counts()
        alignment = 32
        for _ in range(entries):
            name = walk.name()
            value = walk.value(walk.number("I"), name)
            alignment = value if name == "general.alignment" else alignment
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment}")
        infos = [walk.tensor() for _ in range(tensors)]
        start = -(-walk.at // alignment) * alignment
    for name, _, end in infos:
        if start + end > size:
            raise ValueError(f"tensor {shown(name)} ends at byte {start + end}, the file at {size}")
    for (one, _, end), (other, a, _) in pairwise(sorted(infos, key=lambda info: info[1:])):
        if a < end:
            raise ValueError(f"tensors {shown(one)} and {shown(other)} overlap")


class _Walk:
    """Reads a header from front to back and never beyond the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._order = file, size, "<"
        self.at, self._items = 0, 0

    def counts(self) -> tuple[int, int]:
        """(tensors, entries)"""
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._take(4)
        if version[:2] == b"\0\0":
            self._order = ">"
        return self._count(), self._count()

    def name(self) -> str:
        length = self.number("Q")
        if length > _MAX_NAME:
            raise ValueError(f"a name of {length} bytes at byte {self.at}")
        name = self._take(length).decode("utf-8")
        if not name.isprintable():
            raise ValueError(f"the name {shown(name)} cannot be printed")
        return name

    def value(self, kind: int, name: str) -> Any:
        """A number; None for texts and arrays, which are stepped over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            self._skip(self.number("Q"), name)
        elif kind == _ARRAY:
            inner = self.number("I")
            count = self._count(name, 2 if inner == _TEXT else 1)
            if inner in _SCALARS:
                self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"), name)
            elif inner == _TEXT:
                for _ in range(count):
                    self._skip(self.number("Q"), name)
            else:
                raise ValueError(f"entry {shown(name)} is an array of type {inner}")
        else:
            raise ValueError(f"entry {shown(name)} is of type {kind}")
        return None

    def tensor(self) -> tuple[str, int, int]:
        """(name, first byte, end) counted from where the data begin."""
        name, rank = self.name(), self.number("I")
        if rank > _MAX_RANK:
            raise ValueError(f"tensor {shown(name)} has {rank} dimensions")
        shape = [self.number("Q") for _ in range(rank)]
        kind, offset = gguf.GGMLQuantizationType(self.number("I")), self.number("Q")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return name, offset, offset + prod(shape) // block * size

    def number(self, code: str) -> Any:
        return struct.unpack(self._order + code, self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, name: str = "", objects: int = 1) -> int:
        count = self.number("Q")
        self._items += count * objects
        if self._items > _MAX_ITEMS:
            where = f"entry {shown(name)}" if name else "it"
            raise ValueError(f"{where} is said to hold {count} items, more than any model's")
        return count

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        self.at += count
        if len(data) < count:
            raise ValueError(f"it ends at byte {self._size}, inside its header")
        return data

    def _skip(self, count: int, name: str) -> None:
        self.at += count
        if self.at > self._size:
            raise ValueError(
                f"entry {shown(name)} ends at byte {self.at}, the file at {self._size}"
            )
        self._file.seek(count, os.SEEK_CUR)
