"""The blocks of GGUF by their definition, and against the gguf package's own decoding."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from mud_puppy.model import gguf_blocks
from mud_puppy.model.gguf_blocks import INT4, INT8, int4, int8
from tests.model.gguf_files import random_blocks

CASES = [(int4, type) for type in INT4] + [(int8, type) for type in INT8]


def value(found: gguf_blocks.Integers) -> np.ndarray:
    """float32 [out, in]"""
    codes, scales, minimum = found
    size = codes.shape[1] // scales.shape[1]
    values = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), size, 1)
    return values if minimum is None else values + np.repeat(minimum.astype(np.float32), size, 1)


@pytest.mark.parametrize(("decode", "type"), CASES)
def test_integers_and_scales_are_the_weights_bit_for_bit(decode, type):
    rows = random_blocks(6, 3, Kind[type])
    found = decode(rows.reshape(6, -1), type)
    assert found.codes.dtype == (np.uint8 if decode is int4 else np.int8)
    assert found.scales.dtype == (np.float32 if type.endswith("K") else np.float16)
    assert decode is int8 or found.codes.max() <= 15
    np.testing.assert_array_equal(value(found), gguf.dequantize(rows.reshape(6, -1), Kind[type]))


@pytest.mark.parametrize(
    ("type", "name"),
    [
        ("Q4_1", "_nibbles"),
        ("Q5_0", "_nibbles"),
        ("Q4_K", "_nibbles"),
        ("Q4_K", "_six_bits"),
        ("Q6_K", "_q6_k"),
    ],
)
def test_the_comparison_fails_for_another_order(type, name, monkeypatch):
    decode = int4 if type in INT4 else int8
    own = getattr(gguf_blocks, name)
    monkeypatch.setattr(gguf_blocks, name, lambda x: np.roll(own(x), 1, axis=-1))
    rows = random_blocks(6, 3, Kind[type])
    error = value(decode(rows.reshape(6, -1), type)) - gguf.dequantize(
        rows.reshape(6, -1), Kind[type]
    )
    assert np.abs(error).max() > 0.01


def test_a_q4_k_block_by_hand():
    """Scales 1..8 and minimums 9..16 of 6 bits, and the code 5 in the place 32 * 5 + 3."""
    block = np.zeros(144, np.uint8)
    block[:4] = np.array([1, 1], np.float16).view(np.uint8)
    block[4:8], block[8:12] = [1, 2, 3, 4], [9, 10, 11, 12]
    block[12:16] = [5 | 13 << 4, 6 | 14 << 4, 7 | 15 << 4, 8]
    block[11] |= 1 << 6  # the minimum of group 7 is 16: its fifth bit
    block[16 + 32 * 2 + 3] = 5 << 4
    found = int4(block[None], "Q4_K")
    assert found.scales.tolist() == [[*range(1, 9)]]
    assert found.minimum is not None and found.minimum.tolist() == [[*range(-9, -17, -1)]]
    assert np.flatnonzero(found.codes).tolist() == [32 * 5 + 3] and found.codes.max() == 5


def test_a_q6_k_block_by_hand():
    block = np.zeros(210, np.uint8)
    block[208:] = np.array([1], np.float16).view(np.uint8)
    block[192:208] = np.arange(16)
    # The second half of 128: element 70 is in the high nibble of byte 6, its two bits at 4.
    block[64 + 6], block[128 + 32 + 6] = 3 << 4, 2 << 4
    found = int8(block[None], "Q6_K")
    assert found.scales.tolist() == [[*range(16)]]
    assert np.flatnonzero(found.codes != -32).tolist() == [128 + 70]
    assert found.codes[0, 128 + 70] == 3 + (2 << 4) - 32
