"""Stand-ins for ROCm's libraries, so that XLA's ROCm plugin loads on a machine without ROCm.

The plugin is linked against eight libraries (HIP, rocBLAS, MIOpen, ...) that compiling never
calls. For each one that the machine lacks, a shared library is written here, byte by byte, since a
user may have no compiler: it has the name and the versioned symbols that the plugin asks for, and
every function returns an error. Code that calls one learns that there is no device; nothing runs.

Format: System V ABI (ELF-64), and the LSB's chapter on symbol versioning. x86-64 Linux only.
"""

import ctypes
import hashlib
import os
import platform
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from mud_puppy.errors import UserError
from mud_puppy.rocm import elf

NO_DEVICE = 100  # hipErrorNoDevice; any other number than 0 is an error to all eight libraries
PAGE = 4096
Export = tuple[str, str | None]  # symbol, its version

# mov eax, NO_DEVICE; ret
_ERROR = b"\xb8" + struct.pack("<I", NO_DEVICE) + b"\xc3"
# mov dword [rdi], 0; mov eax, NO_DEVICE; ret: the argument is where the count of devices goes
_NONE = b"\xc7\x07" + bytes(4) + _ERROR
# lea rax, [rip + 1]; ret; the text: for functions that return the name of an error
_TEXT = b"\x48\x8d\x05\x01\x00\x00\x00\xc3" + b"stand-in: no ROCm\0"
_TEXT_FUNCTIONS = ("errorstring", "errorname", "status_string", "code_to_string")


def load(plugin: Path, cache: Path | None = None) -> ctypes.CDLL:
    """Load XLA's ROCm plugin, with stand-ins for the libraries that are missing.

    Where the real libraries are found, none is used. Raises UserError where it cannot load.
    """
    try:
        return ctypes.CDLL(str(plugin))
    except OSError:
        libraries = write(plugin, cache or default_cache())
    try:
        for library in libraries:
            ctypes.CDLL(str(library))  # the loader then finds it by its soname
        return ctypes.CDLL(str(plugin))
    except OSError as problem:
        raise UserError(f"XLA's ROCm plugin does not load: {problem}") from problem


def write(plugin: Path, folder: Path) -> list[Path]:
    """Write into `folder` a stand-in for each library that the plugin needs and that is missing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise UserError(
            "compiling for AMD cards without ROCm works on x86-64 Linux only; "
            f"this is {platform.machine()} {sys.platform}"
        )
    try:
        exports = _exports(elf.read(plugin))
    except (ValueError, *elf.DAMAGE) as problem:
        raise UserError(f"XLA's ROCm plugin is damaged: {plugin}: {problem}") from problem
    paths = []
    for soname, symbols in exports.items():
        image = library(soname, symbols)
        # Another version of the plugin asks for other symbols: the name says which these are.
        path = folder / f"{hashlib.sha256(image).hexdigest()[:12]}-{soname}"
        if not path.exists():
            _put(path, image)
        paths.append(path)
    return paths


def _put(path: Path, image: bytes) -> None:
    """Write the file as a whole or not at all, for other processes may look for it too."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(image)
        partial.replace(path)
    except OSError as problem:
        raise UserError(
            f"stand-ins for ROCm's libraries cannot be written: {problem}. "
            "XDG_CACHE_HOME names another place"
        ) from problem


def default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mud_puppy" / "rocm"


def _exports(plugin: elf.Elf) -> dict[str, list[Export]]:
    """Missing library -> what it has to export.

    A symbol without a version does not say whose it is: the first library takes those, and the
    dynamic loader looks through all. Symbols that some system library defines are among them and do
    no harm: that library is asked first or answers the same.
    """
    missing = [name for name in plugin.needed() if not _loads(name)]
    exports: dict[str, list[Export]] = {name: [] for name in missing}
    for symbol in plugin.symbols():
        if symbol.section or symbol.binding != elf.STB_GLOBAL or symbol.kind != elf.STT_FUNC:
            continue
        owner, version = symbol.version or (missing[0] if missing else "", None)
        if owner in exports:
            exports[owner].append((symbol.name, version))
    return exports


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def library(soname: str, exports: Iterable[Export]) -> bytes:
    """The image of a shared library of that name, each of whose functions returns an error.

    `exports`: (symbol, version or None). Layout: one page-aligned segment to read and execute
    (tables, then code), one to write (the dynamic section, which the loader relocates in place).
    """
    exports = sorted(set(exports), key=lambda e: (e[0], e[1] or ""))
    versions = sorted({version for _, version in exports if version})
    strings = _Strings()
    code, at = _code([name for name, _ in exports])
    layout = _Layout(start=64 + 4 * 56)
    layout.add("hash", _hash_table([name for name, _ in exports]))
    names = [strings.add(name) for name, _ in exports]
    numbers = [2 + versions.index(v) if v else 1 for _, v in exports]
    layout.add("versym", struct.pack(f"<{len(exports) + 1}H", 0, *numbers))
    layout.add("verdef", _version_definitions(soname, versions, strings))
    own_name = strings.add(soname)
    layout.add("strings", bytes(strings.data))
    symbols_at = layout.add("symbols", bytes(24 * (len(exports) + 1)))
    code_at = layout.add("code", code)
    rows = (
        # global function, in section 1 of none: any number but 0 means "defined"
        struct.pack("<IBBHQQ", name, 0x12, 0, 1, code_at + at[i], 16)
        for i, name in enumerate(names)
    )
    layout.put(symbols_at, bytes(24) + b"".join(rows))
    code_end = layout.size
    dynamic_at = code_end + PAGE - code_end % PAGE
    dynamic = _dynamic(layout.where, own_name, len(strings.data), len(versions))
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, start, start, start, size, size, align)
        for kind, flags, start, size, align in (
            (1, 5, 0, code_end, PAGE),  # load, read and execute
            (1, 6, dynamic_at, len(dynamic), PAGE),  # load, read and write
            (2, 6, dynamic_at, len(dynamic), 8),  # dynamic
            (0x6474E551, 6, 0, 0, 16),  # the stack is not to be executable
        )
    )
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    layout.put(0, header + segments)
    return bytes(layout.image) + bytes(dynamic_at - code_end) + dynamic


class _Strings:
    """A string table: offsets of the strings that it was given."""

    def __init__(self):
        self.data = bytearray(b"\0")

    def add(self, text: str) -> int:
        self.data += text.encode() + b"\0"
        return len(self.data) - len(text.encode()) - 1


class _Layout:
    """Pieces one after another, 16 bytes aligned, and where each went."""

    def __init__(self, start: int):
        self.image, self.where = bytearray(start), {}

    @property
    def size(self) -> int:
        return len(self.image)

    def add(self, name: str, piece: bytes) -> int:
        self.image += bytes(-len(self.image) % 16)
        self.where[name] = len(self.image)
        self.image += piece
        return self.where[name]

    def put(self, at: int, piece: bytes) -> None:
        self.image[at : at + len(piece)] = piece


def _code(names: list[str]) -> tuple[bytes, list[int]]:
    """Three functions are enough; each symbol's offset into them."""
    bodies = {"error": _ERROR, "none": _NONE, "text": _TEXT}
    code, starts = b"", {}
    for kind, body in bodies.items():
        starts[kind] = len(code)
        code += body + bytes(-len(body) % 16)
    return code, [starts[_kind(name)] for name in names]


def _kind(name: str) -> str:
    if name == "hipGetDeviceCount":
        return "none"
    text = any(part in name.lower() for part in _TEXT_FUNCTIONS)
    return "text" if text else "error"


def _hash_table(names: list[str]) -> bytes:
    """DT_HASH: chains of symbol numbers (from 1) by the ABI's hash of the name."""
    buckets = [0] * max(1, len(names))
    chains = [0] * (len(names) + 1)
    for number, name in enumerate(names, start=1):
        bucket = elf_hash(name) % len(buckets)
        chains[number], buckets[bucket] = buckets[bucket], number
    words = [len(buckets), len(chains), *buckets, *chains]
    return struct.pack(f"<{len(words)}I", *words)


def elf_hash(name: str) -> int:
    """The System V ABI's hash of a symbol's name."""
    h = 0
    for byte in name.encode():
        h = (h << 4) + byte
        top = h & 0xF0000000
        h = (h ^ top >> 24) & ~top & 0xFFFFFFFF
    return h


def _version_definitions(soname: str, versions: list[str], strings: _Strings) -> bytes:
    """.gnu.version_d: the library's own name as the base (1), then the versions from 2 on."""
    rows = b""
    if not versions:
        return rows
    for index, name in enumerate([soname, *versions], start=1):
        following = 28 if index <= len(versions) else 0
        rows += struct.pack(
            "<HHHHIII", 1, index == 1, index, 1, elf_hash(name), 20, following
        ) + struct.pack("<II", strings.add(name), 0)
    return rows


def _dynamic(where: dict[str, int], soname: int, strings_size: int, versions: int) -> bytes:
    hash_, strtab, symtab, strsz, syment, name = 4, 5, 6, 10, 11, 14
    versym, verdef, verdefnum = 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
    rows = [
        (name, soname),
        (hash_, where["hash"]),
        (strtab, where["strings"]),
        (symtab, where["symbols"]),
        (strsz, strings_size),
        (syment, 24),
    ]
    if versions:
        rows += [(versym, where["versym"]), (verdef, where["verdef"]), (verdefnum, versions + 1)]
    return b"".join(struct.pack("<QQ", *row) for row in [*rows, (0, 0)])
