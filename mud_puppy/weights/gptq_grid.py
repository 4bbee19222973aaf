"""The grid that GPTQ files hold: codes of 2, 3, 4 or 8 bits, a scale and a zero point a group.

As AutoGPTQ and gptqmodel store it, with top = 2^bits - 1; code c is (c - zero) * scale:

    symmetric    scale = 2 max|w| / top, zero = 2^(bits - 1)
    asymmetric   scale = (max - min) / top, an integer zero in 1..top. Not 0: files hold zero - 1,
                 and readers add the one to 32 bits at once, where 0 - 1 carries into the next zero

Scales are float16 numbers, which is what files hold: GPTQ makes good the rounding of a scale too.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import int4

BITS = (2, 3, 4, 8)
_SHRINKS = 20  # clip ranges that `clip` tries: 1.00, 0.97, ... of the group's own
Codes = tuple[UInt8[Array, "out n"], Float[Array, "out G"], UInt8[Array, "out G"] | None]
Grid = tuple[int, bool, bool]  # bits, symmetric, clip


def round_to_nearest(
    w: Float[Array, "out n"],
    *,
    bits: int = 4,
    group: int | str = 64,
    symmetric: bool = True,
    clip: bool = False,
) -> Codes:
    """What `gptq` returns, of each weight by itself: the nearest code on the same grid.

    clip: tries smaller ranges for each group, by the squared error of its weights.
    """
    check(w.shape[-1], bits, group)
    size = w.shape[1] if group == "row" else int(group)
    return _round_to_nearest(w, (bits, symmetric, clip), size)


def check(inputs: int, bits: int, group: int | str) -> None:
    """ValueError unless a row of `inputs` is cut into groups, and `bits` are of BITS."""
    if bits not in BITS:
        raise ValueError(f"GPTQ has {', '.join(map(str, BITS))} bits, not {bits!r}")
    if group != "row" and (not isinstance(group, int) or group < 1):
        raise ValueError(f"expected a group size or 'row', got group={group!r}")
    if bits < 8 and inputs % 2:
        raise ValueError(f"rows of {inputs} cannot be stored: codes are two a byte")
    if group != "row" and inputs % int(group):
        fitting = [g for g in (16, 32, 64, 128, 256) if inputs % g == 0]
        raise ValueError(f"rows of {inputs} are no multiple of the group of {group}; "
                         f"groups that fit: {fitting}")  # fmt: skip


def to_quantized(
    codes: UInt8[Array, "*L out n"],
    scales: Float[Array, "*L out G"],
    zeros: UInt8[Array, "*L out G"] | None,
    bits: int,
    dtype: Any,
) -> Quantized:
    """The weight leaf of such codes: int4 for 2, 3 and 4 bits, int8 for 8."""
    if bits == 8:
        # Both lowered by 128: the values are the same, and 128 is no zero point at all.
        own = None if zeros is None else (zeros ^ 128).astype(jnp.int8)
        return Quantized(
            (codes ^ 128).astype(jnp.int8), scales, own, format="int8", dtype=jnp.dtype(dtype)
        )
    if zeros is None and bits < 4:  # int4 without zero points means 8
        zeros = jnp.full(scales.shape, 1 << (bits - 1), jnp.uint8)
    return int4(codes, scales, zeros=zeros, dtype=dtype)


# Inside, weights are [in, out]: a column of the paper is then a row, contiguous in memory.


@partial(jax.jit, static_argnums=(1, 2))
def _round_to_nearest(w: Any, grid: Grid, group: int) -> Codes:
    wt = w.astype(jnp.float32).T
    scales, zeros = scales_of(wt, jnp.ones(len(wt)), grid, group)
    scale, zero = (jnp.repeat(x, group, axis=0) for x in (scales, zeros))
    codes = code_of(wt, scale, zero, grid[0]).astype(jnp.uint8)
    return codes.T, scales.T, None if grid[1] else zeros.T.astype(jnp.uint8)


def scales_of(wt: Any, costs: Any, grid: Grid, group: int) -> tuple[Any, Any]:
    """(scales, zeros), each [G, out], of all groups of wt [in, out]."""
    groups = wt.reshape(-1, group, wt.shape[1]), costs.reshape(-1, group)
    return jax.vmap(lambda x, c: grid_of(x, c, grid))(*groups)


def grid_of(x: Any, costs: Any, grid: Grid) -> tuple[Any, Any]:
    """(scale, zero), float32 [out], of a group x [group, out]; costs [group] of squared errors."""
    bits, symmetric, clip = grid
    top, high, low = (1 << bits) - 1, x.max(0), x.min(0)
    if symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    else:
        high = jnp.maximum(high, 0)
        # At least one step below 0: see the module's text on zero points.
        low = jnp.minimum(low, -high / (top - 1))

    def of(shrink: Any) -> tuple[Any, Any]:
        scale = (high - low) * shrink / top
        # Never 0, nor a subnormal float16, of which little is left.
        scale = jnp.maximum(scale, jnp.finfo(jnp.float16).tiny)
        scale = scale.astype(jnp.float16).astype(jnp.float32)
        middle = jnp.full_like(scale, 1 << (bits - 1))
        return scale, middle if symmetric else jnp.clip(jnp.round(-low * shrink / scale), 1, top)

    if not clip:
        return of(1.0)

    def better(best: Any, shrink: Any) -> Any:
        found = of(shrink)
        error = (costs[:, None] * (x - value_of(x, *found, bits)) ** 2).sum(0)
        keep = error < best[0]
        pick = tuple(jnp.where(keep, a, b) for a, b in zip((error, *found), best, strict=True))
        return pick, None

    start = (jnp.full(x.shape[1:], jnp.inf), *of(1.0))
    shrinks = 1 - 0.03 * jnp.arange(_SHRINKS)
    return jax.lax.scan(better, start, shrinks)[0][1:]


def code_of(x: Any, scale: Any, zero: Any, bits: int) -> Any:
    return jnp.clip(jnp.round(x / scale) + zero, 0, (1 << bits) - 1)


def value_of(x: Any, scale: Any, zero: Any, bits: int) -> Any:
    return (code_of(x, scale, zero, bits) - zero) * scale
