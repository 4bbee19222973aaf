"""A GGUF file's own codes as `Quantized` leaves, nothing lost: Q4_0, Q4_1 and Q8_0.

A row is blocks of 32 weights, each a float16 scale d (Q4_1: and a minimum m) and 32 codes c:

    Q4_0    d, 16 bytes of codes 0..15        (c - 8) * d      int4
    Q4_1    d, m, 16 bytes of codes 0..15     c * d + m        int4 with minimums
    Q8_0    d, 32 int8                        c * d            int8

Byte j of 16 holds element j in its low nibble and element 16 + j in its high one. d * c is exact in
float32, so that the leaves decode to the bits of `gguf.dequantize`, compiled (FMA) or not.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0, ...)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model.gguf import Encoded
from mud_puppy.model.tensors import Stored

KEPT = ("Q4_0", "Q4_1", "Q8_0")
_FLOATS = {"F32", "F16", "BF16"}
_GROUP = 32
_HINT = "load without keep_codes (method qlora: name another quant_backend) to decode and quantize"


class GgufCodes:
    """Which weights of a GGUF file are in codes, and their leaves: what `Codes` is for folders.

    Weights that are stored as floats stay so, and an embedding or head in another format is
    decoded. The layers of a weight are one stack of one format; Q4_0 beside Q4_1 becomes the
    latter, whose minimum -8 d is exact. UserError, with the name of a tensor, for other mixtures,
    for layers in other codes, and for a file without any to keep.
    """

    def __init__(
        self, where: Path, names: dict[str, list[str]], tensors: Mapping[str, Stored]
    ) -> None:
        self.parts: dict[str, list[str]] = {}  # each weight is one tensor, under its own name
        self._stacks: dict[str, list[Encoded]] = {}
        for leaf, weights in names.items():
            found = [tensors[name] for name in weights if name in tensors]
            stack = [tensor for tensor in found if isinstance(tensor, Encoded)]
            if leaf in ("embed", "head"):
                kept = stack[0].type in KEPT if stack else False
            else:
                kept = leaf.endswith("/weight") and _kept(stack)
            if kept:
                self._stacks[leaf] = stack
        if not self._stacks:
            raise UserError(f"{where}: no weight is stored in {_listed()}: {_HINT}")

    def holds(self, leaf: str) -> bool:
        return leaf in self._stacks

    def read(self, leaf: str, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
        """The leaf of each layer [out, in] of a stack, or the one; one tensor at a time."""
        stack = self._stacks[leaf]
        mixed = len({tensor.type for tensor in stack}) > 1
        for tensor in stack:
            yield jax.tree.map(jnp.asarray, _leaf(tensor, shape[-2:], dtype, mixed))


def _kept(stack: list[Encoded]) -> bool:
    """Whether the layers of one weight are codes that are kept (else they are floats)."""
    types = {tensor.type for tensor in stack}
    if types <= _FLOATS or types <= {"Q4_0", "Q4_1"} or types == {"Q8_0"}:
        return not types <= _FLOATS
    for tensor in stack:
        if tensor.type not in {*KEPT, *_FLOATS}:
            raise UserError(
                f"{tensor.where} is stored as {tensor.type}; codes that are kept: {_listed()}: "
                f"{_HINT}"
            )
    first = stack[0]
    other = next(tensor for tensor in stack if tensor.type != first.type)
    raise UserError(
        f"{other.where} is stored as {other.type}, but that of layer 0 as {first.type}: the layers "
        f"of a weight are kept in one format: {_HINT}"
    )


def _listed() -> str:
    return f"{', '.join(KEPT[:-1])} or {KEPT[-1]}"


def _leaf(tensor: Encoded, shape: tuple[int, ...], dtype: str, minimum: bool) -> Quantized:
    """The leaf [out, in], in numpy arrays; minimum: a Q4_0 as a Q4_1."""
    blocks = tensor.blocks().reshape(shape[0], shape[1] // _GROUP, -1)
    scales, lowest = _float16(blocks, 0), None
    if tensor.type == "Q8_0":
        codes, format = blocks[..., 2:].view(np.int8), "int8"
    elif tensor.type == "Q4_1":
        codes, lowest, format = _repacked(blocks[..., 4:]), _float16(blocks, 2), "int4"
    else:
        codes, format = _repacked(blocks[..., 2:]), "int4"
        lowest = -8 * scales if minimum else None
    codes = codes.reshape(shape[0], -1)
    return Quantized(codes, scales, minimum=lowest, format=format, dtype=jnp.dtype(dtype))


def _float16(blocks: np.ndarray, start: int) -> np.ndarray:
    """[out, groups] of the two bytes from `start` of each block."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]


def _repacked(codes: np.ndarray) -> np.ndarray:
    """A block's 16 bytes (elements j and 16 + j) in the order of `Quantized` (2 j and 2 j + 1)."""
    even, odd = codes[..., ::2], codes[..., 1::2]
    return np.concatenate([(even << 4) | (odd & 15), (even & 0xF0) | (odd >> 4)], axis=-1)
