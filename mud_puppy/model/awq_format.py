"""The AWQ layout of AutoAWQ ("gemm"), gptqmodel, vLLM and transformers: 4 bits, read in numpy.

A linear `M` of weight [out, in] is stored without `M.weight`, as SUFFIXES of `M` (a bias stays):

    qweight  int32 [in, out / 8]   codes of one input; nibble i of a word, the lowest first, is that
                                   of output ORDER[i] of the word's eight
    qzeros   int32 [G, out / 8]    zero points, in the same order
    scales   float [G, out]        a weight is (code - zero) * scale

The codes are transposed and become int4 with zero points: nothing is lost. The layouts "gemv",
"gemv_fast", "marlin" and "llm-awq" keep other orders of bits and are refused by name. Source:
https://github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py; AWQ is arXiv:2306.00978.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model.tensors import checked

SUFFIXES = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check_config(config: Mapping[str, Any]) -> None:
    """UserError for a `quantization_config` that `read` does not understand."""
    if (bits := config.get("bits", 4)) != 4:
        raise UserError(f"quantization_config: AWQ of {bits} bits; 4 bits load")
    version = config.get("version") or config.get("format") or "gemm"
    if config.get("backend") == "llm-awq":
        version = "llm-awq"
    if str(version).lower() != "gemm":
        raise UserError(f"quantization_config: AWQ's version '{version}'; only gemm loads")
    size = config.get("group_size", 128)
    if not isinstance(size, int) or (size < 2 and size != -1):
        raise UserError(f"quantization_config: group_size is {size!r}; a number, or -1 for rows")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise UserError(f"quantization_config: pack_dtype {config['pack_dtype']}; only int32 loads")


def read(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, int], config: Mapping[str, Any], dtype: Any
) -> Quantized:
    """The weight [out, in] of the tensors of one linear (by suffix), in numpy; dtype: what
    `dequantize` returns. UserError for shapes that do not fit."""
    out, size = shape
    group = config.get("group_size", 128)
    group = size if group == -1 else group
    if out % 8 or size % 2 or size % group:
        raise UserError(
            f"AWQ: a weight {shape} is no whole words of 8 outputs, and groups of {group} inputs"
        )
    groups = size // group
    words = _by_output(checked(tensors, "qweight", (size, out // 8), np.int32))
    even, odd = words[:, ::2], words[:, 1::2]
    codes = _outputs((even << 4) | (odd & 15), (even & 0xF0) | (odd >> 4))
    words = _by_output(checked(tensors, "qzeros", (groups, out // 8), np.int32))
    zeros = _outputs(words & 15, words >> 4)
    scales = np.ascontiguousarray(checked(tensors, "scales", (groups, out)).T.astype(np.float32))
    return Quantized(codes, scales, zeros, format="int4", dtype=np.dtype(dtype))


def _by_output(words: np.ndarray) -> np.ndarray:
    """uint8 [out / 8, n, 4], the bytes of int32 [n, out / 8]: words are transposed, not codes."""
    return np.ascontiguousarray(words.T.astype("<i4")).view(np.uint8).reshape(*words.T.shape, 4)


def _outputs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """uint8 [out, n] of what each byte of the words says of two outputs, both [out / 8, n, 4]."""
    found = np.empty((len(low), 8, low.shape[1]), np.uint8)
    for byte in range(4):
        found[:, ORDER[2 * byte]] = low[..., byte]
        found[:, ORDER[2 * byte + 1]] = high[..., byte]
    return found.reshape(-1, low.shape[1])
