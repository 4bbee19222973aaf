"""A folder's SHA256SUMS: what is in each of its files, so that damage is found before it is used.

The file reads as coreutils writes it: `cd checkpoint-30 && sha256sum -c SHA256SUMS` checks a
checkpoint without us. Its last line counts the files, so a list that was cut short is noticed too.
One core hashes about 1.7 GB/s.
"""

import hashlib
import os
from pathlib import Path

SUMS = "SHA256SUMS"


def seal(directory: Path) -> None:
    """Writes SHA256SUMS over every file under `directory` and flushes all of it to the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(directory).as_posix()}\n" for path in files]
    (directory / SUMS).write_text("".join(lines) + f"# {len(files)} files\n")
    for path in [*directory.rglob("*"), directory]:
        flush(path)


def find_damage(directory: Path) -> str | None:
    """What is wrong with the sealed `directory`, in words; None if every file is as it was."""
    try:
        lines = (directory / SUMS).read_text().split("\n")
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read: {error}"
    if lines[-2:] != [f"# {len(lines) - 2} files", ""]:
        return f"{SUMS} is cut short or changed"
    for line in lines[:-2]:
        digest, _, name = line.partition("  ")
        try:
            if _digest(directory / name) != digest:
                return f"{name} is not what was written (SHA-256 differs)"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {error}"
    return None


def flush(path: Path) -> None:
    """fsync: what was written to this file, or renamed in this folder, survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
