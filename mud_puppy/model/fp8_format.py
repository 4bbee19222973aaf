"""The fine-grained fp8 layout of DeepSeek-V3 and Qwen3's "-FP8" models, read in numpy.

    M.weight             float8_e4m3fn [out, in]
    M.weight_scale_inv   float32 [out / block, in / block], rounded up: what a block's codes are
                         multiplied by; or one number for the whole weight
    M.activation_scale   a scale of the inputs, where they are static: not read

compressed-tensors' float8 in blocks by other names (`compressed_tensors`): our fp8 in groups, whose
scales are copied to each row of a block. Source: transformers' integrations/finegrained_fp8.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model import compressed_tensors
from mud_puppy.model.compressed_tensors import Scheme
from mud_puppy.model.tensors import checked

SUFFIXES = ("weight", "weight_scale_inv")
EXTRAS = ("activation_scale", "input_scale")


def scheme(config: Mapping[str, Any]) -> Scheme:
    """How a `quantization_config` stores weights; UserError for what is not read."""
    if (found := config.get("fmt", "e4m3")) != "e4m3":
        raise UserError(f"quantization_config: fmt is '{found}'; e4m3 loads")
    if (found := config.get("expert_dtype", "fp8")) != "fp8":
        raise UserError(f"quantization_config: experts are {found}; fp8 loads")
    inputs = config.get("activation_scheme", "dynamic")
    block = config.get("weight_block_size", (128, 128))
    if block is None:
        return Scheme(8, "tensor", type="float", unrounded=f"float8, {inputs}")
    if len(block) != 2 or any(not isinstance(size, int) or size < 1 for size in block):
        raise UserError(f"quantization_config: weight_block_size is {block}, not two sizes")
    return Scheme(8, block[1], type="float", block=block[0], unrounded=f"float8, {inputs}")


def read(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme, dtype: Any
) -> Quantized:
    """The weight [out, in] of the tensors of one linear, by suffix; dtype: what `dequantize`
    returns. UserError for tensors of another shape than a weight of `shape` has."""
    expected = ()
    if isinstance(scheme.group, int):
        expected = -(-shape[0] // scheme.block), -(-shape[1] // scheme.group)
    scales = checked(tensors, "weight_scale_inv", expected, np.float32)
    named = {"weight": tensors["weight"], "weight_scale": scales.reshape(expected or 1)}
    return compressed_tensors.read(named, shape, scheme, dtype)
