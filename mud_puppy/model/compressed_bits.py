"""Codes 0..2^bits - 1 as compressed-tensors stores them, and back, in numpy: signed integers, int32
words of consecutive bits, and bytes of two."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mud_puppy.errors import UserError


def signed(codes: np.ndarray, offset: int) -> np.ndarray:
    """uint8 as int8: codes less `offset`."""
    return (codes.astype(np.int16) - offset).astype(np.int8)


def unsigned(codes: np.ndarray, offset: int) -> np.ndarray:
    """The inverse of `signed`."""
    return (codes.astype(np.int16) + offset).astype(np.uint8)


def words(n: int, bits: int) -> int:
    """int32 words that n codes take."""
    return -(-n * bits // 32)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] as int32 [rows, words], the first code lowest."""
    tail = -codes.shape[1] % (32 // bits)
    padded = np.pad(codes, ((0, 0), (0, tail)))
    if bits == 4:
        padded = padded[:, ::2] | (padded[:, 1::2] << 4)
    return np.ascontiguousarray(padded).view("<i4")


def unpack_words(stored: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The inverse of `pack_words`."""
    codes = np.ascontiguousarray(stored.astype("<i4")).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return codes[:, :n]


def swap_pairs(pairs: np.ndarray) -> np.ndarray:
    """uint8 of two codes, from the first in the high nibble (ours) to the low one, and back."""
    return (pairs << 4) | (pairs >> 4)


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
