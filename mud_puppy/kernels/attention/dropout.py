"""Dropout of attention weights by a counter: which weights fall is a function of where they stand.

kept(seed, b, h, i, j) is a hash, so the forward and backward of every implementation agree with no
mask in memory, whatever the blocks. b, h, i, j count rows of the batch, query heads, queries, keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BITS = 24  # of the hash are compared with the rate


def kept(rate: float, seed: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """bool, of the shape that b, h, i and j broadcast to: P(True) is 1 - rate to 2^-24.

    seed is uint32; b, h, i and j are integers.
    """
    head = _mix(_mix(seed ^ _step(b, 0x85EBCA6B)) ^ _step(h, 0xC2B2AE35))
    query = _mix(head ^ _step(i, 0x9E3779B1))
    bits = _mix(query ^ _step(j, 0x27D4EB2F)) >> jnp.uint32(32 - BITS)
    return bits.astype(jnp.int32) >= round(rate * 2**BITS)


def _step(index: Any, factor: int) -> Any:
    """Odd factors permute the integers, so no two indices give one counter."""
    return (jnp.asarray(index, jnp.int32).astype(jnp.uint32) + jnp.uint32(1)) * jnp.uint32(factor)


def _mix(x: Any) -> Any:
    """Wellons' lowbias32: every bit of x moves every bit of the result with probability 1/2."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def seed_of(seed: Any) -> jax.Array:
    """An integer or integer array of one element as uint32 []."""
    if isinstance(seed, int):
        seed = np.uint32(seed & 0xFFFFFFFF)
    seed = jnp.asarray(seed)
    if not jnp.issubdtype(seed.dtype, jnp.integer) or seed.size != 1:
        raise ValueError(
            f"attention: dropout_seed must be one integer, got {seed.dtype}{list(seed.shape)}: "
            "jax.random.bits(key) makes one of a key"
        )
    return seed.reshape(()).astype(jnp.uint32)
