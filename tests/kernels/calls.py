"""Small calls of the ops, as users have them: without the type checks of tests."""

import inspect
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from mud_puppy import kernels

NAMES = [name for name in kernels.__all__ if name not in ("Quantized", "matmul")]
bare = SimpleNamespace(**{name: inspect.unwrap(getattr(kernels, name)) for name in NAMES})


def floats(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


Q, K, V = (floats(2, 16, h, 16, seed=i) for i, h in enumerate((4, 2, 2)))
HIDDEN, HEAD = floats(2, 8, 32), floats(40, 32)
WORDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)), jnp.int32)
ROWS, EXPERTS, SIZES = floats(20, 32), floats(3, 16, 32), jnp.array([5, 0, 15])
CACHE, AT = (floats(2, 4, 4, 16), K, V), jnp.full((2, 4), 9)
CODES = jnp.ones((16, 32), jnp.int8)


def attend(*args, **options):
    return lambda: bare.flash_attention(*(args or (Q, K, V)), **options)


def decode(*args, at=AT, **options):
    return lambda: bare.decode_attention(*(args or CACHE), at, **options)


def entropy(hidden=HIDDEN, head=HEAD, words=WORDS, **options):
    return lambda: bare.linear_cross_entropy(hidden, head, words, **options)


def logps(hidden=HIDDEN, head=HEAD, words=WORDS, **options):
    return lambda: bare.token_logps(hidden, head, words, **options)


def grouped(x=ROWS, w=EXPERTS, sizes=SIZES, **options):
    return lambda: bare.grouped_matmul(x, w, sizes, **options)
