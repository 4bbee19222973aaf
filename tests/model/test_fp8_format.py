"""The fine-grained fp8 layout: configs, and one scale for a whole weight. Blocks are with the other
layouts (`test_quantized_files`), transformers' decoding in `test_made_elsewhere`."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.kernels import dequantize
from mud_puppy.model.compressed_tensors import Scheme
from mud_puppy.model.fp8_format import read, scheme

CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_one_scale_and_blocks_over_the_last_rows():
    w = np.random.default_rng(0).normal(size=(6, 8)).astype(ml_dtypes.float8_e4m3fn)
    values = w.astype(np.float32)
    one = scheme(CONFIG | {"weight_block_size": None, "activation_scheme": "static"})
    assert one == Scheme(8, "tensor", type="float", unrounded="float8, static")
    tensors = {"weight": w, "weight_scale_inv": np.float32(0.5), "activation_scale": np.ones(1)}
    leaf = jax.tree.map(jnp.asarray, read(tensors, (6, 8), one, "float32"))
    np.testing.assert_array_equal(dequantize(leaf), values / 2)
    blocks = scheme(CONFIG | {"weight_block_size": [4, 4]})
    scales = np.array([[1, 2], [3, 4]], np.float32)
    leaf = read({"weight": w, "weight_scale_inv": scales}, (6, 8), blocks, "float32")
    want = values * np.repeat(np.repeat(scales, 4, 0)[:6], 4, 1)
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, leaf)), want)
    assert np.abs(want - values * np.repeat(np.repeat(scales.T, 4, 0)[:6], 4, 1)).max() > 1
    for bad in (scales[:1], scales.astype(np.uint8)):
        with pytest.raises(
            UserError, match=r"weight_scale_inv is .*(expected \[2, 2\]|are floats)"
        ):
            read({"weight": w, "weight_scale_inv": bad}, (6, 8), blocks, "float32")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_autofp8_says_one_scale(shape):
    w = np.random.default_rng(0).normal(size=(6, 8)).astype(ml_dtypes.float8_e4m3fn)
    own = {"quant_method": "fp8", "activation_scheme": "static"}
    scale = np.full(shape, 0.25, ml_dtypes.bfloat16)
    tensors = {"weight": w, "weight_scale": scale, "input_scale": np.float32(1)}
    leaf = jax.tree.map(jnp.asarray, read(tensors, (6, 8), scheme(own), "float32"))
    np.testing.assert_array_equal(dequantize(leaf), w.astype(np.float32) / 4)
    with pytest.raises(UserError, match=r"weight_scale is float32\[6\], expected \[\]"):
        read(tensors | {"weight_scale": np.ones(6, np.float32)}, (6, 8), scheme(own), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; e4m3 loads"),
        ({"expert_dtype": "fp4"}, "experts are fp4"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\], not two sizes"),
        ({"weight_block_size": [0, 128]}, "not two sizes"),
    ],
)
def test_configs_that_are_not_understood(change, message):
    assert scheme(CONFIG) == Scheme(8, 128, type="float", block=128, unrounded="float8, dynamic")
    with pytest.raises(UserError, match=message):
        scheme(CONFIG | change)
