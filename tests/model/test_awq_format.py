"""AWQ's gemm layout against a reader of single nibbles, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.kernels import dequantize
from mud_puppy.model import awq_format
from mud_puppy.model.awq_format import ORDER, SUFFIXES, check_config, read

OUT, IN, GROUP = 24, 96, 32
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def words(codes):
    """int32 [n, out / 8] of codes [n, out], nibble by nibble, as AutoAWQ packs them."""
    n, out = codes.shape
    packed = np.zeros((n, out // 8), np.uint32)
    for i, column in enumerate(ORDER):
        packed |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return packed.view(np.int32)


def made(group=GROUP, seed=0):
    """(tensors of one linear, its weight [out, in])"""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (IN, OUT)).astype(np.uint8)
    zeros = random.integers(0, 16, (IN // group, OUT)).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, (IN // group, OUT)).astype(np.float16)
    index = np.arange(IN) // group
    w = (codes.astype(np.float32) - zeros[index]) * scales.astype(np.float32)[index]
    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, w.T


@pytest.mark.parametrize("group", [GROUP, -1])
def test_every_weight_is_what_the_file_says(group):
    tensors, want = made(IN if group == -1 else group)
    leaf = read(tensors, (OUT, IN), CONFIG | {"group_size": group}, "float32")
    assert (leaf.format, leaf.shape, leaf.group) == ("int4", (OUT, IN), IN if group < 0 else group)
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, leaf)), want)


def test_a_word_by_hand():
    # Nibbles from the lowest: outputs 0, 2, 4, 6, 1, 3, 5, 7.
    tensors = {
        "qweight": np.array([[0x75316420], [0]], np.uint32).view(np.int32),
        "qzeros": np.zeros((1, 1), np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    leaf = read(tensors, (8, 2), CONFIG | {"group_size": -1}, "float32")
    assert dequantize(jax.tree.map(jnp.asarray, leaf))[:, 0].tolist() == [*range(8)]


@pytest.mark.parametrize("fault", ["order", "rows", "zeros"])
def test_the_comparison_fails_for_other_codes(fault, monkeypatch):
    tensors, want = made()
    if fault == "order":  # GPTQ's, one after the other
        monkeypatch.setattr(awq_format, "ORDER", tuple(range(8)))
    if fault == "rows":
        tensors["qweight"] = tensors["qweight"][::-1]
    if fault == "zeros":  # GPTQ's version 1, less one
        tensors["qzeros"] = tensors["qzeros"] - 0x11111111
    got = dequantize(jax.tree.map(jnp.asarray, read(tensors, (OUT, IN), CONFIG, "float32")))
    assert np.abs(got - want).max() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qweight": np.zeros((96, 4), np.int32)},
            r"qweight is int32\[96, 4\], expected int32\[96",
        ),
        ({"qweight": np.zeros((96, 3), np.int64)}, "qweight is int64"),
        (
            {"qzeros": np.zeros((4, 3), np.int32)},
            r"qzeros is int32\[4, 3\], expected int32\[3, 3\]",
        ),
        ({"scales": np.ones((24, 3), np.float16)}, r"scales is float16\[24, 3\], .*\[3, 24\]"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors, _ = made()
    assert tuple(tensors) == SUFFIXES
    with pytest.raises(UserError, match=message):
        read(tensors | change, (OUT, IN), CONFIG, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "AWQ of 8 bits"),
        ({"version": "gemv"}, "AWQ's version 'gemv'; only gemm loads"),
        ({"version": "gemv_fast"}, "'gemv_fast'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"version": None, "format": "llm-awq"}, "'llm-awq'"),
        ({"backend": "llm-awq"}, "'llm-awq'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "all"}, "group_size is 'all'"),
        ({"pack_dtype": "int16"}, "pack_dtype int16"),
    ],
)
def test_configs_that_are_not_understood(change, message):
    for written in ({}, {"version": "GEMM"}, {"version": None}):  # AutoAWQ's, old and new
        check_config(CONFIG | written)
    with pytest.raises(UserError, match=message):
        check_config(CONFIG | change)


def test_sizes_that_fill_no_word():
    tensors, _ = made()
    for shape in ((20, IN), (OUT, 80)):
        with pytest.raises(UserError, match="no whole words of 8 outputs, and groups of 32 inputs"):
            read(tensors, shape, CONFIG, "float32")
