"""Decode once to x's dtype, then XLA's own matrix product: best for many rows, right everywhere."""

from typing import Any

import jax.numpy as jnp

from mud_puppy.kernels.formats import Quantized, dequantize
from mud_puppy.kernels.matmul import contract_last, exact


def product(x: Any, w: Quantized) -> Any:
    return contract_last(x, dequantize(w, x.dtype))


def transposed_product(g: Any, w: Quantized) -> Any:
    """g[..., out] @ w[out, in]"""
    return jnp.matmul(g, dequantize(w, g.dtype), precision=exact(g.dtype))
