"""The MXFP4 layout of gpt-oss' experts, both ways, in numpy.

The weights of all experts of a projection, [E, out, in], which transformers calls `P` (no
".weight", and [E, in, out] where it is stored in floats), are stored as:

    P_blocks   uint8 [E, out, in / 32, 16]   E2M1, two a byte, the even input in the low nibble
    P_scales   uint8 [E, out, in / 32]       E8M0: a power of two, 127 for one; 255 is NaN

which is our mxfp4 with the nibbles swapped: nothing is lost. Source: `convert_moe_packed_tensors`
of transformers' integrations/mxfp4.py; OCP Microscaling Formats 1.0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import swap_nibbles
from mud_puppy.model.tensors import checked

SUFFIXES = ("blocks", "scales")
GROUP = 32


def pack(q: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one projection [E, out, in], by suffix; UserError for other codes."""
    if q.format != "mxfp4" or q.group != GROUP:
        raise UserError(f"MXFP4 files hold mxfp4 in groups of {GROUP}, not {q.format} of {q.group}")
    scales = np.asarray(q.scales)
    blocks = swap_nibbles(np.asarray(q.codes)).reshape(*scales.shape, GROUP // 2)
    return {"blocks": blocks, "scales": scales}


def read(tensors: Mapping[str, np.ndarray], shape: tuple[int, ...], dtype: Any) -> Quantized:
    """The inverse of `pack`; dtype: what `dequantize` returns. UserError for tensors of another
    shape than a weight of `shape` has, and for a scale that is NaN."""
    *rows, size = shape
    if size % GROUP:
        raise UserError(f"MXFP4: rows of {size} are not whole groups of {GROUP}")
    groups = size // GROUP
    blocks = checked(tensors, "blocks", (*rows, groups, GROUP // 2), np.uint8)
    scales = checked(tensors, "scales", (*rows, groups), np.uint8)
    check_scales(scales, "scales")
    codes = swap_nibbles(blocks).reshape(*rows, size // 2)
    return Quantized(codes, scales, format="mxfp4", dtype=np.dtype(dtype))


def check_scales(scales: np.ndarray, name: str) -> None:
    """UserError for an E8M0 scale that is no number."""
    if (scales == 255).any():
        raise UserError(f"{name} holds a scale that is NaN (255): the file is corrupt")


def quantization_config(skip: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`; skip: HF modules that are stored as they are."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": skip}
