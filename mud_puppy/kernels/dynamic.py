"""Blocks of numbers in 8 bits: codes of a dynamic map, and one float32 absmax for each block.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861); the maps are bitsandbytes'
(`formats.dynamic_map`). A value is (sign) 10^(i - 6) * fraction: decade i of 7 holds 2^i evenly
spaced fractions of 0.1 to 1 (signed), or 2^(i + 1) (unsigned); beside them there are 0 and 1. So
the nearest code is found from the decade and one multiplication.

Codes have the shape of what they stand for, so that they are split over devices alike. A block is
cut from the last axis where it can be, else from the last few, so that it crosses no more shards
than it must.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mud_puppy.kernels.formats import dynamic_map

BLOCK = 256
SMALLEST_BLOCK = 128  # a float32 for 128 codes is 3 % on top
DECADES = 7


@partial(jax.jit, static_argnames="signed")
def encode(x: Float[Array, "..."], signed: bool) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    """(codes of x's shape, absmax of its `blocks`). Unsigned: x >= 0, and no x > 0 becomes 0.

    A NaN or an infinity makes its block decode to NaN.
    """
    parts = _cut(x)
    absmax = jnp.abs(parts).max(-1)
    ratio = parts / jnp.where(absmax > 0, absmax, 1)[..., None]
    codes = nearest(ratio, signed)
    if not signed:
        # As a denominator a 0 would make the update of a small gradient a huge one.
        codes = jnp.where(parts > 0, jnp.maximum(codes, 1), codes)
    absmax = jnp.where(jnp.isfinite(absmax), absmax, jnp.nan)
    return _joined(codes, x.shape), absmax


@partial(jax.jit, static_argnames="signed")
def decode(codes: UInt8[Array, "..."], absmax: Float[Array, "..."], signed: bool) -> Array:
    """float32 of the codes' shape."""
    values = jnp.take(jnp.asarray(dynamic_map(signed)), codes.astype(jnp.int32), mode="clip")
    return _joined(_cut(values) * absmax[..., None], codes.shape)


def nearest(y: Float[Array, "..."], signed: bool) -> UInt8[Array, "..."]:
    """The code of the map's value nearest to y in [-1, 1] (unsigned: [0, 1])."""
    a = jnp.abs(y)
    bounds = [_bound(i, signed) for i in range(1, DECADES)]
    decade = sum((a > bound).astype(jnp.int32) for bound in bounds)
    count = jnp.left_shift(_count(0, signed), decade)
    tens: Any = 10.0 ** (DECADES - 1)
    for i, bound in enumerate(bounds):
        tens = jnp.where(a > bound, 10.0 ** (DECADES - 2 - i), tens)
    k = ((a * tens - 0.1) * (count / 0.9)).astype(jnp.int32)
    index = count - _count(0, signed) + jnp.clip(k, 0, count - 1)
    values = dynamic_map(signed)
    zero = 127 if signed else 0
    code = zero + 1 + index
    code = jnp.where(a > (values[254] + 1) / 2, 255, code)
    if signed:  # there is no -1
        code = jnp.where(y < 0, zero - 1 - index, code)
    return jnp.where(a > values[zero + 1] / 2, code, zero).astype(jnp.uint8)


def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the absmax of an array of this shape."""
    return _layout(shape)[0]


def _bound(i: int, signed: bool) -> np.float32:
    """Half way between the last value of decade i - 1 and the first of decade i."""
    values, zero = dynamic_map(signed), 127 if signed else 0
    at = zero + 1 + _count(i, signed) - _count(0, signed)
    return (values[at - 1] + values[at]) / np.float32(2)


def _count(i: int, signed: bool) -> int:
    return 2**i if signed else 2 ** (i + 1)


def _layout(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(shape of the blocks, elements a block): blocks are cut from a product of last axes."""
    for axes in range(1, len(shape) + 1):
        size = math.prod(shape[-axes:])
        block = next((b for b in range(BLOCK, SMALLEST_BLOCK - 1, -1) if size % b == 0), None)
        if block is not None:
            return (*shape[:-axes], size // block), block
    return (-(-math.prod(shape) // BLOCK),), BLOCK  # the last block is filled up


def _cut(x: Array) -> Array:
    """[..., blocks, elements], filled up with zeros where `_layout` says so."""
    shape, block = _layout(x.shape)
    missing = math.prod(shape) * block - x.size
    flat = jnp.pad(x.reshape(-1), (0, missing)) if missing else x
    return flat.reshape(*shape, block)


def _joined(parts: Array, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape)
    return parts.reshape(shape) if parts.size == size else parts.reshape(-1)[:size].reshape(shape)
