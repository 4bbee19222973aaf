"""Rounding to a grid of integers with straight-through gradients (arXiv:1308.3432).

    weights       w ~ c * s,  c = clip(round(w / s), low, high),  s shared by a group of inputs
                  int8: c in [-127, 127];  int4: c in [-8, 7]
    activations   x ~ c * s,  c in [-127, 127],  s = absmax / 127 of each token

s of a weight is range / high. The range is its group's absmax, found anew at each call (then
nothing is clipped, and int4's -8 is never used), or it learns, with the gradient of LSQ
(arXiv:1902.08153). LSQ learns s; the range is what has the size of a weight, and so moves as fast
as weights do under Adam, whose steps have the size of the rate whatever the gradient's.
The tokens' grid is vLLM's and torchao's. (The compressed-tensors library divides by 127.5, which
puts the largest input on a tie: -127 or -128, as the last bit of a division has it.)
Everything is float32 until the caller's dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GRID = {"int8": (-127, 127), "int4": (-8, 7)}


def round_weight(
    w: Float[Array, "... out n"],
    range: Float[Array, "... out G"] | None,
    format: str,
    group: int | None,
) -> Float[Array, "... out n"]:
    """The values on the grid, float32.

    Gradients: w's passes where its code is within the grid, and the range gets LSQ's (its equation
    3, over high) times 1 / sqrt(group * high). Within is decided of the rounded code, as torch
    does: the paper decides before rounding, which differs in the outer half step. group: inputs
    that share a scale, None for a row.
    """
    x = _grouped(w, group)
    values: Any = _to_grid(x, format) if range is None else _to_learned_grid(x, range, format)
    return values.reshape(w.shape)


def weight_codes(w: Array, range: Array | None, format: str, group: int | None) -> Any:
    """(codes of w's shape, scales [..., out, G]), float32: what `round_weight` multiplies."""
    x = _grouped(w, group)
    scales = _scales(x, range, format)
    return _codes(x, scales, format).reshape(w.shape), scales


def widest_range(w: Array, group: int | None) -> Float[Array, "... out G"]:
    """The absmax of each group: where learning starts, with nothing clipped."""
    return jnp.abs(_grouped(w, group)).max(-1)


@jax.custom_vjp
def round_rows(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """x with each row on a grid of int8, in x's dtype; the gradient passes as it is."""
    codes, scales = row_codes(x)
    return (codes.astype(jnp.float32) * scales).astype(x.dtype)


round_rows.defvjp(lambda x: (round_rows(x), None), lambda _, g: (g,))


def row_codes(x: Float[Array, "... n"]) -> Any:
    """(int8 codes of x's shape, float32 scales [..., 1])."""
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(-1, keepdims=True) / 127
    scales = jnp.where(scales == 0, 1, scales)
    return jnp.clip(jnp.round(x / scales), -127, 127).astype(jnp.int8), scales


# On groups x [..., out, G, group] with scales [..., out, G].


def _grouped(w: Array, group: int | None) -> Array:
    size = w.shape[-1]
    return w.astype(jnp.float32).reshape(*w.shape[:-1], -1, group or size)


def _scales(x: Array, range: Array | None, format: str) -> Array:
    range = jnp.abs(x).max(-1) if range is None else jnp.abs(range)
    scales = range / GRID[format][1]
    return jnp.where(scales == 0, 1, scales)


def _codes(x: Array, scales: Array, format: str) -> Array:
    return jnp.clip(jnp.round(x / scales[..., None]), *GRID[format])


def _values(x: Array, scales: Array, format: str) -> Array:
    return _codes(x, scales, format) * scales[..., None]


# The values themselves, not w + stop_gradient(values - w), whose sum is rounded once more.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _to_grid(x: Array, format: str) -> Array:
    return _values(x, _scales(x, None, format), format)


_to_grid.defvjp(lambda x, format: (_to_grid(x, format), None), lambda format, _, g: (g,))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _to_learned_grid(x: Array, range: Array, format: str) -> Array:
    return _values(x, _scales(x, range, format), format)


def _to_learned_forward(x: Array, range: Array, format: str) -> Any:
    return _to_learned_grid(x, range, format), (x, range)


def _to_learned_backward(format: str, saved: Any, g: Array) -> tuple[Array, Array]:
    x, range = saved
    low, high = GRID[format]
    scales = _scales(x, range, format)
    steps = x / scales[..., None]
    nearest = jnp.round(steps)
    inside = (low <= nearest) & (nearest <= high)
    slope = jnp.where(inside, nearest - steps, jnp.clip(nearest, low, high))
    of_range = (g * slope).sum(-1) * jnp.sign(range) / high * (x.shape[-1] * high) ** -0.5
    return jnp.where(inside, g, 0), of_range


_to_learned_grid.defvjp(_to_learned_forward, _to_learned_backward)
