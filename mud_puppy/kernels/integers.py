"""Activations as integers: codes with a scale for a tensor, a channel or a row.

    x = (codes - zero_point) * scale

Symmetric codes use -127..127 (8 bits) around 0 and have no zero point; the others use the whole
range and hold 0 exactly. `formats.dequantize` reads the triples. Sums and norms are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Triple = tuple[Array, Array, Array | None]


def quantize_per_tensor(x: Float[Array, "..."], bits: int = 8, symmetric: bool = True) -> Triple:
    """(int8 codes of x's shape, float32 scale [], int32 zero point [] or None)."""
    return _encode(x, tuple(range(x.ndim)), bits, symmetric, keep=False)


def quantize_per_channel(
    x: Float[Array, "..."], axis: int = 0, bits: int = 8, symmetric: bool = True
) -> Triple:
    """As `quantize_per_tensor` for each index of `axis`; scale and zero point broadcast to x."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"x{list(x.shape)} has no axis {axis}")
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return _encode(x, others, bits, symmetric, keep=True)


def quantized_layernorm(
    x: Float[Array, "*B D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"] | None = None,
    eps: float = 1e-5,
) -> tuple[Int[Array, "*B D"], Float[Array, "*B 1"]]:
    """LayerNorm whose result is int8: (codes, float32 scale of each row), ready for `qgemm`.

    Raises ValueError for a weight or bias that is not [D].
    """
    _check_width("quantized_layernorm", x, weight=weight, bias=bias)
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * _along(weight, x)
    return _rows(y if bias is None else y + _along(bias, x))


def quantized_rmsnorm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float = 1e-6
) -> tuple[Int[Array, "*B D"], Float[Array, "*B 1"]]:
    """RMSNorm whose result is int8, as `quantized_layernorm`."""
    _check_width("quantized_rmsnorm", x, weight=weight)
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    return _rows(y * _along(weight, x))


def _along(vector: Array, x: Array) -> Array:
    """A [D] for x [..., D], float32."""
    return jax.lax.broadcast_to_rank(vector.astype(jnp.float32), x.ndim)


def _check_width(op: str, x: Array, **vectors: Array | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: expected {name} {list(x.shape[-1:])} for x{list(x.shape)}, got "
                f"{list(vector.shape)}"
            )


def _rows(y: Array) -> tuple[Array, Array]:
    codes, scale, _ = _encode(y, (y.ndim - 1,), 8, True, keep=True)
    return codes, scale


def _encode(x: Array, axes: tuple[int, ...], bits: int, symmetric: bool, keep: bool) -> Triple:
    if bits not in range(2, 9):
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    x = x.astype(jnp.float32)
    top = 2 ** (bits - 1) - 1
    bottom, zero = -top, None
    if symmetric:
        scale = _not_zero(jnp.abs(x).max(axes, keepdims=True, initial=0) / top)
        steps = x / scale
    else:
        bottom = -top - 1
        low = x.min(axes, keepdims=True, initial=0)
        high = x.max(axes, keepdims=True, initial=0)
        scale = _not_zero((high - low) / (2**bits - 1))
        zero = jnp.clip(jnp.round(bottom - low / scale), bottom, top)
        steps = x / scale + zero
    codes = jnp.clip(jnp.round(steps), bottom, top).astype(jnp.int8)
    shape: Any = scale.shape if keep else ()
    zero = None if zero is None else zero.astype(jnp.int32).reshape(shape)
    return codes, scale.reshape(shape), zero


def _not_zero(scale: Array) -> Array:
    """A tensor of zeros has scale 1."""
    return jnp.where(scale == 0, 1, scale)
