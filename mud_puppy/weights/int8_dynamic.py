"""Products of integers: int8 or int4 codes with inputs that are rounded to int8 as they come.

    y[t, o] = s_t * sum_G s_oG * (sum over the inputs of group G of x's code * w's code)

The inner sums are exact (`kernels.qgemm`), so that this is what a `FakeQuant` with activations
"int8" trained, to the rounding of float32. The gradient of x passes straight through its rounding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.kernels import Quantized, matmul, qgemm
from mud_puppy.kernels.formats import decoded_scales, sliced, unpack
from mud_puppy.weights.leaf import Int8Dynamic
from mud_puppy.weights.rounding import row_codes


def int8_dynamic(q: Quantized) -> Int8Dynamic:
    """`q` (int8, or int4 without minimums) with its inputs rounded to int8, a scale each token."""
    if q.format not in ("int8", "int4") or q.minimum is not None:
        raise ValueError(f"int8_dynamic: {q.format} codes are no integers times a scale")
    return Int8Dynamic(q)


@matmul.register(Int8Dynamic)
def _int8_dynamic_matmul(w: Int8Dynamic, x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    return _product(rows, sliced(w.base)).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(x: Array, q: Quantized) -> Array:
    codes, x_scales = row_codes(x)
    w, w_scales = _integers(q), decoded_scales(q)
    groups = w_scales.shape[-1]
    if groups == 1:
        return qgemm(codes, w, x_scales, w_scales, dtype=x.dtype)
    take = partial(jax.lax.dynamic_slice_in_dim, slice_size=q.group, axis=1)

    def add(G: Any, y: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(w_scales, G, axis=1)
        return y + qgemm(take(codes, G * q.group), take(w, G * q.group), x_scales, own)

    y = jax.lax.fori_loop(0, groups, add, jnp.zeros((len(x), len(w)), jnp.float32))
    return y.astype(x.dtype)


def _forward(x: Array, q: Quantized) -> tuple[Array, Quantized]:
    return _product(x, q), q


def _backward(q: Quantized, g: Array) -> tuple[Array, None]:
    x = jnp.zeros((len(g), q.shape[-1]), g.dtype)
    return *jax.vjp(lambda x: matmul(x, q), x)[1](g), None


_product.defvjp(_forward, _backward)


def _integers(q: Quantized) -> Array:
    """int8 [out, in]: the codes less their zero points."""
    if q.format == "int8":
        return q.codes
    codes = unpack(q.codes).astype(jnp.int8)
    zeros = 8 if q.zeros is None else jnp.repeat(q.zeros.astype(jnp.int8), q.group, axis=-1)
    return codes - zeros
