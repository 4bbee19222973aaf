"""Reading 64-bit little-endian ELF files (plugins, kernel binaries), by the ELF specification.

Reads section headers, dynamic symbols with their versions, and notes. Only what this room needs.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOTE, DYNSYM, DYNAMIC, VERSYM, VERNEED = 7, 11, 6, 0x6FFFFFFF, 0x6FFFFFFE
DT_NEEDED = 1
STT_FUNC, STB_GLOBAL = 2, 1
DAMAGE = (struct.error, IndexError, OverflowError)  # what reading a damaged file may raise


@dataclass(frozen=True)
class Section:
    kind: int
    address: int
    offset: int
    size: int
    link: int
    name: str


@dataclass(frozen=True)
class Symbol:
    name: str
    kind: int  # STT_*
    binding: int  # STB_*
    section: int  # 0: undefined
    address: int
    size: int
    version: tuple[str, str] | None = None  # (library, version) that an undefined one asks for


class Elf:
    """A view of the file's bytes. Raises ValueError on what is no 64-bit little-endian ELF."""

    def __init__(self, data: "bytes | mmap.mmap", name: str = "data"):
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{name} is no 64-bit little-endian ELF file")
        self.data = data
        (self.machine,) = struct.unpack_from("<H", data, 18)
        (self.flags,) = struct.unpack_from("<I", data, 48)
        self.sections = self._sections()

    def _sections(self) -> list[Section]:
        (start,) = struct.unpack_from("<Q", self.data, 40)
        step, count, names = struct.unpack_from("<HHH", self.data, 58)
        rows = [struct.unpack_from("<IIQQQQII", self.data, start + i * step) for i in range(count)]
        base = rows[names][4] if rows else 0
        return [
            Section(kind, address, offset, size, link, self._string(base + name))
            for name, kind, _, address, offset, size, link, _ in rows
        ]

    def _string(self, at: int) -> str:
        return self.data[at : self.data.find(b"\0", at)].decode()

    def _of_kind(self, kind: int) -> Section | None:
        return next((s for s in self.sections if s.kind == kind), None)

    def contents(self, name: str) -> bytes:
        """The bytes of the section of that name; KeyError where there is none."""
        for s in self.sections:
            if s.name == name:
                return self.data[s.offset : s.offset + s.size]
        raise KeyError(name)

    def section(self, name: str) -> Section:
        return next(s for s in self.sections if s.name == name)

    def needed(self) -> list[str]:
        """Names of the shared libraries that the file asks for, in order."""
        table = self._of_kind(DYNAMIC)
        if table is None:
            return []
        strings = self.sections[table.link].offset
        raw = self.data[table.offset : table.offset + table.size]
        entries = struct.iter_unpack("<QQ", raw)
        return [self._string(strings + value) for tag, value in entries if tag == DT_NEEDED]

    def symbols(self) -> Iterator[Symbol]:
        """The dynamic symbols."""
        table = self._of_kind(DYNSYM)
        if table is None:
            return
        strings = self.sections[table.link].offset
        versions, index_of = self._wanted_versions(), self._of_kind(VERSYM)
        for i in range(1, table.size // 24):
            name, info, _, section, address, size = struct.unpack_from(
                "<IBBHQQ", self.data, table.offset + 24 * i
            )
            version = None
            if index_of and not section:
                (index,) = struct.unpack_from("<H", self.data, index_of.offset + 2 * i)
                version = versions.get(index & 0x7FFF)
            text = self._string(strings + name)
            yield Symbol(text, info & 15, info >> 4, section, address, size, version)

    def _wanted_versions(self) -> dict[int, tuple[str, str]]:
        """Version index -> (library, version), of .gnu.version_r."""
        table, found = self._of_kind(VERNEED), {}
        if table is None:
            return found
        strings, at, more = self.sections[table.link].offset, table.offset, True
        while more:
            _, count, library, first, following = struct.unpack_from("<HHIII", self.data, at)
            entry = at + first
            for _ in range(count):
                _, _, index, name, step = struct.unpack_from("<IHHII", self.data, entry)
                found[index] = (self._string(strings + library), self._string(strings + name))
                entry += step
            at, more = at + following, bool(following)
        return found

    def notes(self) -> Iterator[tuple[str, int, bytes]]:
        """(owner, type, contents) of each note."""
        for section in self.sections:
            if section.kind != NOTE:
                continue
            at, end = section.offset, section.offset + section.size
            while at + 12 <= end:
                owner, size, kind = struct.unpack_from("<III", self.data, at)
                text = self.data[at + 12 : at + 12 + owner].rstrip(b"\0").decode()
                start = at + 12 + (owner + 3 & ~3)
                yield text, kind, self.data[start : start + size]
                at = start + (size + 3 & ~3)


def read(path: Path | str) -> Elf:
    """The file, mapped into memory rather than read: a plugin has 500 MB."""
    with open(path, "rb") as file:
        return Elf(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))
