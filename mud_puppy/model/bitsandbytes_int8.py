"""The layout of bitsandbytes' LLM.int8 linears, as transformers saves it, read in numpy.

    M.weight          int8 [out, in]
    M.SCB             float32 [out]     each row's largest magnitude: a weight is code * SCB / 127
    M.weight_format   uint8 []          0: in rows, the one order that is written since 0.45

The codes and SCB / 127 are our int8 with a scale for each row. That inputs of outlier features are
multiplied apart, in 16 bits, is how bitsandbytes computes and not in the file: here no input is
rounded. Source: `Linear8bitLt` of https://github.com/bitsandbytes-foundation/bitsandbytes at 0.50;
LLM.int8 is arXiv:2208.07339.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model.tensors import checked

SUFFIXES = ("weight", "SCB", "weight_format")


def read(tensors: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: Any) -> Quantized:
    """The weight [out, in] of the tensors of one linear, by suffix (old files have no
    weight_format); dtype: what `dequantize` returns. UserError for tensors that do not fit."""
    if "weight_format" in tensors:
        order = checked(tensors, "weight_format", (), np.uint8)
        if order != 0:
            raise UserError(f"weight_format is {order}: only weights in rows (0) are read")
    codes = checked(tensors, "weight", shape, np.int8)
    scales = checked(tensors, "SCB", shape[:1], np.float32) / np.float32(127)
    return Quantized(codes, scales[:, None], format="int8", dtype=np.dtype(dtype))
