"""Checkpoints that mislead: each function returns what makes one of a sound model's folder."""

import json
import os
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.bad_inputs.damage import TENSORS

INDEX = "model.safetensors.index.json"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
Damage = Callable[[Path], Any]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_raw(path: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    """A file with this header text; length: what it says of the text's length, if not the truth."""
    said = len(text) if length is None else length
    path.write_bytes(said.to_bytes(8, "little") + text + data)


def length(said: int) -> Damage:
    """The header's length is a lie."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / TENSORS)
        write_raw(folder / TENSORS, json.dumps(header).encode(), data, said)

    return damage


def garbage(length: int, holds: bytes = b"", start: bytes = b"") -> Damage:
    """A header of `length` bytes: `start` and then `holds` again and again, or a hole."""

    def damage(folder: Path) -> None:
        with (folder / TENSORS).open("wb") as file:
            repeats = (length - len(start)) // max(1, len(holds))
            file.write(length.to_bytes(8, "little") + start + holds * repeats)
            file.truncate(8 + length)

    return damage


def text(change: Callable[[str], str]) -> Damage:
    """The header's JSON is edited as text."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / TENSORS)
        write_raw(folder / TENSORS, change(json.dumps(header)).encode(), data)

    return damage


def entry(name: str = UP, **fields: Any) -> Damage:
    """What the header says of one tensor."""
    return header(lambda found: found | {name: found[name] | fields})


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return text(lambda old: json.dumps(change(json.loads(old))))


def moved(step: int, name: str = UP) -> Damage:
    """One tensor's offsets, and its shape's promise with them, lie `step` bytes from the truth."""

    def change(found: dict[str, Any]) -> dict[str, Any]:
        a, b = found[name]["data_offsets"]
        return found | {name: found[name] | {"data_offsets": [a + step, b + step]}}

    return header(change)


def longer(count: int) -> Damage:
    """Bytes after the last tensor."""

    def damage(folder: Path) -> None:
        with (folder / TENSORS).open("ab") as file:
            file.write(b"x" * count)

    return damage


def vast(folder: Path) -> None:
    """A model 2^16 wide with 2^24 tokens, which takes no room on the disk: the file is a hole."""
    wider = {16: 2**15, 32: 2**16, 258: 2**24}
    found, end = {}, 0
    for name, value in header_of(folder / TENSORS)[0].items():
        if name != "__metadata__":
            shape: list[int] = [wider.get(size) or size for size in value["shape"]]
            start, end = end, end + 4 * prod(shape)
            found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(found).encode()
    write_raw(folder / TENSORS, text, b"")
    os.truncate(folder / TENSORS, 8 + len(text) + end)
    fields(hidden_size=2**16, vocab_size=2**24, head_dim=2**14)(folder)


def fields(**changes: Any) -> Damage:
    """Fields of config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def insert(name: str, after: str, what: str) -> Damage:
    """Text put into a file behind the first `after`."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text().replace(after, after + what, 1))

    return damage


def shards(change: Callable[[dict[str, str]], dict[str, Any]], twice: bool = False) -> Damage:
    """Two shards, a.safetensors with all but UP and b.safetensors with it, and an index of them
    changed; twice: b has DOWN, which is in a, too."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        (folder / TENSORS).unlink()
        b = {name: tensors[name] for name in ((UP, DOWN) if twice else (UP,))}
        a = {name: array for name, array in tensors.items() if name != UP}
        save_file(a, folder / "a.safetensors")
        save_file(b, folder / "b.safetensors")
        names = {name: "b.safetensors" if name == UP else "a.safetensors" for name in tensors}
        (folder / INDEX).write_text(json.dumps({"weight_map": change(names)}))

    return damage


def linked(name: str, to: str) -> Damage:
    """The file is moved to `to`, seen from the folder, and a link left in its place."""

    def damage(folder: Path) -> None:
        target = folder / to
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target)
        (folder / name).symlink_to(to)

    return damage


def snapshot(repository: str) -> Damage:
    """The folder becomes a snapshot in a hub cache, its weights a blob of `repository`."""

    def damage(folder: Path) -> None:
        cache = folder.parent / f"{folder.name}-cache"
        home = cache / "models--org--name" / "snapshots" / "1234"
        blob = cache / repository / "blobs" / "5678"
        for parent in (home.parent, blob.parent):
            parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / TENSORS, blob)
        (folder / TENSORS).symlink_to(f"../../../{repository}/blobs/5678")
        os.replace(folder, home)
        folder.symlink_to(home)

    return damage


def pipe(name: str) -> Damage:
    """The file is a FIFO, which blocks whoever opens it."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def directory(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def sparse(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def gguf(*entries: bytes, tensors: int = 0, count: int | None = None, end: bytes = b"") -> Damage:
    """The folder becomes a GGUF file of these metadata entries; count: what it says there are."""

    def damage(folder: Path) -> None:
        said = len(entries) if count is None else count
        data = b"GGUF" + struct.pack("<IQQ", 3, tensors, said) + b"".join(entries) + end
        folder.with_suffix(".gguf").write_bytes(data)

    return damage


def gguf_text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def gguf_array(name: bytes, kind: int, count: int, data: bytes) -> bytes:
    """A metadata entry: an array that says it has `count` elements of `kind`."""
    return gguf_text(name) + struct.pack("<IIQ", 9, kind, count) + data


def gguf_tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return gguf_text(name) + sizes + struct.pack("<IQ", kind, offset)
