"""Kernels: one file or folder an op, each with a reference that its tests compare it with.

Imports nothing of ours. Arrays in, arrays out; bad shapes raise ValueError.
"""

from mud_puppy.kernels.attention import decode_attention, flash_attention
from mud_puppy.kernels.cross_entropy import token_logps
from mud_puppy.kernels.matmul import matmul

__all__ = ["decode_attention", "flash_attention", "matmul", "token_logps"]
