"""Files that strangers wrote: what is asked of one before it is read.

It must be a plain file (a pipe would wait for ever), of a size that fits, inside its own folder;
its JSON must say each thing once. Parsers differ on which of two equal keys they keep, so that a
file with both means one thing to the program that checked it and another to the one that runs it.
"""

import json
import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError

# The largest index known (a mixture of 70,000 tensors) is 9 MB. Parsed, JSON takes up to 30 times
# its bytes, so that this limit is also one of memory.
MAX_JSON_BYTES = 32 * 2**20


def file_size(path: Path) -> int:
    """Bytes of a plain file; UserError for anything else, so that opening it cannot block."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise UserError(f"{path}: is {what}, expected a file; download the model again")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when the file is missing, no JSON, or something else."""
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise UserError(
            f"{path}: {size} bytes are more than any model's ({MAX_JSON_BYTES}); refused, download "
            "the model again"
        )
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def parse_json(data: bytes) -> Any:
    """The value of UTF-8 JSON; ValueError where a key stands twice with different values."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and seen[key] != value:
                raise ValueError(f"the key {shown(key)} stands twice, with different values")
            seen[key] = value
    return found


def shown(name: str) -> str:
    """A name from a file in an error: quoted, printable and short."""
    return repr(name if len(name) <= 120 else f"{name[:117]}...")


def check_folder(folder: Path, patterns: Iterable[str]) -> None:
    """UserError where a file of these names is no plain file, or a link to outside the folder.

    A link would have us read, and write out again with the tokenizer, whatever it names. The hub's
    cache is made of links, so one into the blobs of the snapshot's own repository is no fault:
    models--org--name/snapshots/REVISION/file -> ../../blobs/HASH.
    """
    homes = [Path(os.path.realpath(folder))]
    repository = homes[0].parent.parent
    if homes[0].parent.name == "snapshots" and repository.name.startswith("models--"):
        homes.append(Path(os.path.realpath(repository / "blobs")))
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from None
    for name in names:
        path = folder / name
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(home) for home in homes):
            raise UserError(
                f"{path}: is a link out of the model's folder, to {target}; refused, put the file "
                "itself there if you trust it"
            )
        if path.exists() and not path.is_dir():
            file_size(path)
