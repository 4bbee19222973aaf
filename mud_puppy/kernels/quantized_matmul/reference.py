"""The definition: decode in float32, multiply in float32 (float64 for float64 inputs)."""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.formats import Quantized, dequantize


def product(x: Any, w: Quantized) -> Any:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    values = dequantize(w, wide)
    y = jnp.einsum("...i,oi->...o", x.astype(wide), values, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def transposed_product(g: Any, w: Quantized) -> Any:
    """g[..., out] @ w[out, in]"""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    values = dequantize(w, wide)
    dx = jnp.einsum("...o,oi->...i", g.astype(wide), values, precision=jax.lax.Precision.HIGHEST)
    return dx.astype(g.dtype)
