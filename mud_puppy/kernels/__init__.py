"""Kernels: one file or folder an op, each with a reference that its tests compare it with.

Imports nothing of ours. Arrays in, arrays out; bad shapes raise ValueError.
"""

from mud_puppy.kernels.attention import decode_attention, flash_attention
from mud_puppy.kernels.checks import selfchecks
from mud_puppy.kernels.cross_entropy import linear_cross_entropy, token_logps
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import Quantized, dequantize
from mud_puppy.kernels.grouped_matmul import grouped_matmul
from mud_puppy.kernels.integers import (
    quantize_per_channel,
    quantize_per_tensor,
    quantized_layernorm,
    quantized_rmsnorm,
)
from mud_puppy.kernels.matmul import matmul
from mud_puppy.kernels.qgemm import fbgemm, qgemm
from mud_puppy.kernels.quantized_matmul import quantized_matmul

__all__ = [
    "Quantized",
    "decode_attention",
    "dequantize",
    "fbgemm",
    "flash_attention",
    "grouped_matmul",
    "linear_cross_entropy",
    "matmul",
    "qgemm",
    "quantize",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantized_layernorm",
    "quantized_matmul",
    "quantized_rmsnorm",
    "selfchecks",
    "token_logps",
]
