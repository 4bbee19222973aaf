"""Norms over the last axis, their statistics in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.model.arch import Arch

Tree = Any


def norm(arch: Arch, p: Tree, name: str, x: Float[Array, "*B n"]) -> Float[Array, "*B n"]:
    """The norm `name` of the params p; x as it is where there is none."""
    if name not in p:
        return x
    if arch.norm == "layer":
        return layer_norm(x, p[name], p.get(f"{name}_bias"), arch.norm_eps)
    return rms_norm(x, p[name], arch.norm_eps, arch.norm_offset)


def rms_norm(
    x: Float[Array, "*B n"], w: Float[Array, "..."], eps: float, offset: float = 0.0
) -> Float[Array, "*B n"]:
    """x / root mean square, times offset + w (arXiv:1910.07467).

    w is [n], or more of them for the last axes of x. With an offset (Gemma) the product is in
    float32; else in x's dtype, as llama's.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if offset:
        return (y * (offset + w.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * w.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B n"], w: Float[Array, "..."], bias: Array | None, eps: float
) -> Float[Array, "*B n"]:
    """(x - mean) / standard deviation, times w, plus bias (arXiv:1607.06450), in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * w.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
