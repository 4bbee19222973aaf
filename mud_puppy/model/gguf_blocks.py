"""The blocks of a GGUF tensor as integers with scales, in numpy and without loss.

A row is blocks. In those of 32 weights a code c has the block's float16 scale d (Q4_1: and minimum
m); a K-quant's have 256 weights in groups with small scales of their own:

    Q4_0    d, 16 bytes of codes 0..15                      (c - 8) d
    Q4_1    d, m, 16 bytes of codes 0..15                   c d + m
    Q5_0    d, 4 bytes of fifth bits, 16 bytes              (c - 16) d
    Q8_0    d, 32 int8                                      c d
    Q4_K    d, n, 8 x (s, t) of 6 bits, 128 bytes           c (d s) - (n t)     groups of 32
    Q6_K    128 bytes, 64 of two high bits, 16 int8 s, d    (c - 32) (d s)      groups of 16

Byte j of 16 (of 32 in Q4_K) holds element j in its low nibble and one half further in its high one.
A product of a float16 and 6 or 8 bits is exact in float32, and so is that with a code.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0, ...)
"""

from typing import NamedTuple

import numpy as np

# The types that are minimum + scale * (code of 4 bits), and those that are scale * int8.
INT4 = ("Q4_0", "Q4_1", "Q4_K")
INT8 = ("Q4_0", "Q5_0", "Q6_K", "Q8_0")
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34, "Q4_K": 144, "Q6_K": 210}


class Integers(NamedTuple):
    """codes: uint8 [out, in] (int4), or int8; scales [out, groups] and, of int4, minimum: float16,
    or float32 of K-quants."""

    codes: np.ndarray
    scales: np.ndarray
    minimum: np.ndarray | None = None


def int4(rows: np.ndarray, type: str) -> Integers:
    """Codes 0..15, and a scale and minimum for each 32, of uint8 [out, bytes] of a type in INT4."""
    blocks = rows.reshape(len(rows), -1, _BYTES[type])
    if type == "Q4_K":
        steps = _six_bits(blocks[..., 4:16])
        scales = _half(blocks, 0)[..., None].astype(np.float32) * steps[..., 0, :]
        lowest = _half(blocks, 2)[..., None].astype(np.float32) * -steps[..., 1, :]
        codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
        return Integers(_flat(codes), _flat(scales), _flat(lowest))
    scales = _half(blocks, 0)
    lowest = _half(blocks, 2) if type == "Q4_1" else -8 * scales
    return Integers(_flat(_nibbles(blocks[..., -16:])), scales, lowest)


def int8(rows: np.ndarray, type: str) -> Integers:
    """int8 codes, and a scale for each 32 (Q6_K: 16), of uint8 [out, bytes] of a type in INT8."""
    blocks = rows.reshape(len(rows), -1, _BYTES[type])
    if type == "Q6_K":
        scales = _half(blocks, 208)[..., None].astype(np.float32) * blocks[..., 192:208].view(
            np.int8
        )
        return Integers(_flat(_q6_k(blocks) - np.int8(32)), _flat(scales))
    scales = _half(blocks, 0)
    if type == "Q8_0":
        return Integers(_flat(blocks[..., 2:].view(np.int8)), scales)
    codes = _nibbles(blocks[..., -16:]).view(np.int8)
    if type == "Q4_0":
        return Integers(_flat(codes - np.int8(8)), scales)
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little").view(np.int8)
    return Integers(_flat((codes | (fifth << 4)) - np.int8(16)), scales)


def _six_bits(packed: np.ndarray) -> np.ndarray:
    """int8 [..., 2, 8], s and t, of the 12 bytes of Q4_K: the first four of each are whole, of the
    last four the low nibbles are together and two high bits lie over the first ones."""
    s, t, low = (packed[..., i : i + 4] for i in (0, 4, 8))
    late_s = (low & 15) | ((s >> 6) << 4)
    late_t = (low >> 4) | ((t >> 6) << 4)
    both = [np.concatenate([x & 63, y], axis=-1) for x, y in ((s, late_s), (t, late_t))]
    return np.stack(both, axis=-2).view(np.int8)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """int8 [out, blocks, 256], codes 0..63: in each half of 128, 64 bytes hold four bits of 32
    elements and of those 32 further on, and in the high nibbles of the next 64; 32 bytes hold the
    two high bits of all four."""
    shape = blocks.shape[:2]
    low = blocks[..., :128].reshape(*shape, 2, 2, 32)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = np.concatenate([low & 15, low >> 4], axis=-2) | (((high >> shifts) & 3) << 4)
    return codes.reshape(*shape, 256).view(np.int8)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """float16 [out, blocks] of the two bytes from `start` of each block."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The codes of bytes: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _flat(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.reshape(len(x), -1))
