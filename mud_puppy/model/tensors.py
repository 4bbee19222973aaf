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

from mud_puppy.errors import UserError
from mud_puppy.model.header import Entry, read_header

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
# What checkpoints hold beside their weights (old attention masks), or nothing here computes in.
_OTHERS = {
    "BOOL": np.dtype(np.bool_),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_KNOWN = DTYPES | CODES | _OTHERS
_NAMES = {dtype: name for name, dtype in _KNOWN.items()}


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
    header = read_header(path, {name: dtype.itemsize for name, dtype in _KNOWN.items()})
    return {name: _stored(path, name, entry) for name, entry in header.items()}


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
        raise UserError(
            f"{tensor.where} is stored as {_NAMES[tensor.dtype]}; dtypes that load: "
            f"{', '.join(sorted(DTYPES))}"
        )


def _stored(path: Path, name: str, entry: Entry) -> Stored:
    dtype = _KNOWN[entry.dtype]
    read = partial(_read, path, entry.start, prod(entry.shape[1:]) * dtype.itemsize)
    return Stored(entry.shape, dtype, read, f"{path}: tensor '{name}'")


def _read(path: Path, start: int, row_bytes: int, a: int, b: int, out: np.ndarray) -> None:
    assert out.flags.c_contiguous and out.nbytes == (b - a) * row_bytes
    view, done = out.reshape(-1).view(np.uint8).data, 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start + a * row_bytes)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(f"{path}: ended while it was read; it changed under us")
                done += count
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def write_safetensors(
    path: Path,
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes the tensors, in the order of `specs` (name: shape, dtype), holding one at a time."""
    header: dict[str, dict] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses files without
    end = 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
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
