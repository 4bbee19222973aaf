"""Safetensors files as rows that can be read one block at a time, and written one tensor at a time.

A reader here is `Stored`: shape, dtype and a function that reads rows. Reads are `pread`s into the
caller's buffer, not a memory map, so that a file's pages never count as this process's memory.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data).
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mud_puppy.errors import UserError

# What a weight can be stored as, and loaded as.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# What only the layouts of quantized weights store: never a weight as it is (`check_float`).
CODES = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: `read(a, b, out)` fills C-contiguous `out` of `dtype` with rows a:b.

    where: file and name, for errors.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int, np.ndarray], None]
    where: str = ""


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name. A file that is cut short or corrupt is a UserError."""
    try:
        # The library checks the header: sizes, overlaps, and that the file holds what it says.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({_line(error)}); copy or download it again"
        ) from None
    header.pop("__metadata__", None)
    return {name: _stored(path, 8 + size, name, entry) for name, entry in header.items()}


def checked(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: Any = None
) -> np.ndarray:
    """The tensor of that name; UserError for another shape, or dtype where one is given."""
    tensor = np.asarray(tensors[name])
    if tensor.shape != shape or dtype not in (None, tensor.dtype):
        kind = "" if dtype is None else np.dtype(dtype).name
        raise UserError(
            f"{name} is {tensor.dtype.name}{list(tensor.shape)}, expected {kind}{list(shape)}"
        )
    return tensor


def check_float(tensor: Stored) -> None:
    """UserError for a tensor that can be no weight as it is: codes, or integers."""
    if tensor.dtype not in DTYPES.values():
        names = {dtype: name for name, dtype in CODES.items()}
        raise _refused(tensor.where, names[tensor.dtype])


def _stored(path: Path, start: int, name: str, entry: dict) -> Stored:
    known, where = DTYPES | CODES, f"{path}: tensor '{name}'"
    if entry["dtype"] not in known:
        raise _refused(where, entry["dtype"])
    shape, dtype = tuple(entry["shape"]), known[entry["dtype"]]
    row_bytes = prod(shape[1:]) * dtype.itemsize
    read = partial(_read, path, start + entry["data_offsets"][0], row_bytes)
    return Stored(shape, dtype, read, where)


def _refused(where: str, dtype: str) -> UserError:
    return UserError(f"{where} is stored as {dtype}; dtypes that load: {', '.join(sorted(DTYPES))}")


def _read(path: Path, start: int, row_bytes: int, a: int, b: int, out: np.ndarray) -> None:
    assert out.flags.c_contiguous and out.nbytes == (b - a) * row_bytes
    view, done = out.reshape(-1).view(np.uint8).data, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start + a * row_bytes)
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise UserError(f"{path}: ended while it was read; it changed under us")
            done += count


def write_safetensors(
    path: Path,
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes the tensors, in the order of `specs` (name: shape, dtype), holding one at a time."""
    names = {dtype: name for name, dtype in (DTYPES | CODES).items()}
    header: dict[str, dict] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses files without
    end = 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        entry = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), tensor in zip(specs.items(), tensors, strict=True):
            assert tensor.shape == shape and tensor.dtype == dtype, name
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
