"""Codes 0..2^bits - 1 as compressed-tensors stores them, and back, in numpy: signed integers, int32
words of consecutive bits."""

import numpy as np


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
