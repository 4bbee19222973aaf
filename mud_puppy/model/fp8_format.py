"""The fine-grained fp8 layout of DeepSeek-V3 and Qwen3's "-FP8" models, read in numpy.

    M.weight             float8_e4m3fn [out, in]
    M.weight_scale_inv   float32 [out / block, in / block], rounded up: what a block's codes are
                         multiplied by; or one number for the whole weight
    M.activation_scale   a scale of the inputs, where they are static: not read

AutoFP8's files call the same scale of a whole weight `weight_scale`. These are compressed-tensors'
float8 by other names: our fp8, in groups whose scales are copied to each row of a block. Sources:
transformers' integrations/finegrained_fp8.py; https://github.com/neuralmagic/AutoFP8
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model import compressed_tensors
from mud_puppy.model.compressed_tensors import Scheme
from mud_puppy.model.tensors import checked

SCALES = ("weight_scale_inv", "weight_scale")
EXTRAS = ("activation_scale", "input_scale")


def scheme(config: Mapping[str, Any]) -> Scheme:
    """How a `quantization_config` stores weights; UserError for what is not read. A config without
    a block size is AutoFP8's."""
    if (found := config.get("fmt", "e4m3")) != "e4m3":
        raise UserError(f"quantization_config: fmt is '{found}'; e4m3 loads")
    if (found := config.get("expert_dtype", "fp8")) != "fp8":
        raise UserError(f"quantization_config: experts are {found}; fp8 loads")
    inputs = config.get("activation_scheme", "dynamic")
    block = config.get("weight_block_size")
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
    name = next(name for name in SCALES if name in tensors)
    expected = np.shape(tensors[name]) if np.size(tensors[name]) == 1 else ()
    if isinstance(scheme.group, int):
        expected = -(-shape[0] // scheme.block), -(-shape[1] // scheme.group)
    scales = checked(tensors, name, expected)
    if scales.dtype.kind != "f" and scales.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{name} is {scales.dtype.name}: scales are floats")
    one = scheme.group == "tensor"
    named = {"weight": tensors["weight"], "weight_scale": scales.reshape(1) if one else scales}
    return compressed_tensors.read(named, shape, scheme, dtype)
