"""Products of float8: x @ w.T with both operands rounded to 8 bits, sums in float32.

Source: FP8 Formats for Deep Learning (arXiv:2209.05433): e4m3 for activations and weights, e5m2 for
gradients, each tensor with a scale from its own largest value (current scaling). Three products:

    y  = x8 w8^T     e4m3 by e4m3
    dx = g8 w8       e5m2 by e4m3
    dw = g8^T x8     e5m2 by e4m3, only for a weight that trains

Scales are powers of two: multiplying by one rounds nothing, so that a product may leave its matrix
unit in bfloat16 and be scaled there (XLA makes the scale a part of the product on NVIDIA and AMD);
a floating-point grid loses nothing by it but up to half of its largest octave.

Values beyond the largest float8 saturate. What is no number stays none: a tensor with a NaN or an
infinity becomes NaN as a whole, so that a step which overflowed is seen.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.kernels import target
from mud_puppy.kernels.target import Target


@dataclass(frozen=True)
class Float8:
    """How products are made: the float8 of values and weights, and that of gradients.

    emulated: the same roundings, but a bfloat16 product, for chips that have no float8 one.
    """

    forward: str
    backward: str
    emulated: bool = False


OCP = Float8("float8_e4m3fn", "float8_e5m2")
FNUZ = Float8("float8_e4m3fnuz", "float8_e5m2fnuz")
SMALLEST = 2.0**-126  # scales below would be subnormal, which GPUs flush to zero


def float8(chip: Target | None = None) -> Float8 | None:
    """The float8 that a chip multiplies (None: the current target), or None if it has none.

    NVIDIA from Ada on and AMD's gfx12 and gfx950 have OCP's, gfx942 has fnuz. XLA's CPU compiler
    multiplies float8 by widening it, which is `emulated` under another name.
    """
    chip = chip or target.current()
    if chip.platform == "cuda":
        return OCP if int(chip.arch.removeprefix("sm").rstrip("af")) >= 89 else None
    if chip.platform == "rocm":
        return FNUZ if chip.arch == "gfx942" else OCP if _has_ocp(chip.arch) else None
    return None


def _has_ocp(arch: str) -> bool:
    return arch == "gfx950" or arch.startswith("gfx12")


def scale_of(x: Float[Array, "..."], dtype: Any, axes: Any = None) -> Float[Array, "..."]:
    """float32: the least power of two s for which x / s fits into `dtype`, over `axes` (all).

    1 for zeros, NaN where x has a NaN or an infinity.
    """
    amax = jnp.max(jnp.abs(x), axis=axes).astype(jnp.float32)
    least = jnp.maximum(amax / float(jnp.finfo(dtype).max), SMALLEST)
    bits = jax.lax.bitcast_convert_type(least, jnp.uint32) + jnp.uint32(0x7FFFFF)  # up
    power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)
    scale = jnp.where(amax > 0, power, 1.0)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def cast(x: Float[Array, "..."], scale: Any, dtype: Any) -> Array:
    """x / scale, for a power of two, rounded to the nearest `dtype` and saturated."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * (1 / scale), -largest, largest).astype(dtype)


def fp8_matmul(
    x: Float[Array, "*B n"], w: Float[Array, "m n"], scale: Any = None, *, types: Float8 = OCP
) -> Float[Array, "*B m"]:
    """x[..., in] @ w[out, in].T -> [..., out] in x's dtype; gradients of x and w.

    scale: `scale_of(w, types.forward)` where it is known; it gets no gradient. dw is float32,
    rounded once to w's dtype. Between the passes x is kept in 8 bits.
    """
    scale = scale_of(w, types.forward) if scale is None else scale
    return _trained(x, w, jax.lax.stop_gradient(scale), types)


def fp8_codes_matmul(
    x: Float[Array, "*B n"], codes: Any, scale: Any, *, types: Float8 = OCP
) -> Float[Array, "*B m"]:
    """x[..., in] @ (codes * scale)[out, in].T for a weight that does not train.

    codes: of the dtype `types.forward`. scale: float32, one power of two ([] or [1, 1]), or one of
    any value for each row [out, 1], which costs a pass over the product.
    Differentiable in x alone; between the passes only codes and scale are kept.
    """
    return _frozen(x, codes, scale, types)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _trained(x: Any, w: Any, scale: Any, types: Float8) -> Any:
    return _trained_forward(x, w, scale, types)[0]


def _trained_forward(x: Any, w: Any, scale: Any, types: Float8) -> Any:
    sx = scale_of(x, types.forward)
    x8, w8 = cast(x, sx, types.forward), cast(w, scale, types.forward)
    y = _dot(x8, w8, (x.ndim - 1, 1), x.dtype, sx * scale, types)
    return y, (x8, sx, w, scale)


def _trained_backward(types: Float8, saved: Any, g: Any) -> Any:
    x8, sx, w, scale = saved
    sg = scale_of(g, types.backward)
    g8, w8 = cast(g, sg, types.backward), cast(w, scale, types.forward)
    dx = _dot(g8, w8, (g.ndim - 1, 0), g.dtype, sg * scale, types)
    rows, inputs = g8.reshape(-1, g.shape[-1]), x8.reshape(-1, x8.shape[-1])
    dw = _dot(rows, inputs, (0, 0), jnp.float32, sg * sx, types)
    return dx, dw.astype(w.dtype), jnp.zeros_like(scale)


_trained.defvjp(_trained_forward, _trained_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _frozen(x: Any, codes: Any, scale: Any, types: Float8) -> Any:
    sx = scale_of(x, types.forward)
    one = scale.reshape(()) if scale.size == 1 else 1.0
    y = _dot(cast(x, sx, types.forward), codes, (x.ndim - 1, 1), x.dtype, sx * one, types)
    return y if scale.size == 1 else (y.astype(jnp.float32) * scale[:, 0]).astype(x.dtype)


def _frozen_forward(x: Any, codes: Any, scale: Any, types: Float8) -> Any:
    return _frozen(x, codes, scale, types), (codes, scale)


def _frozen_backward(types: Float8, saved: Any, g: Any) -> Any:
    codes, scale = saved
    # A row's scale is one of the sum's terms here: it goes into g before that is rounded.
    scaled = g.astype(jnp.float32) * scale.reshape(-1)
    sg = scale_of(scaled, types.backward)
    dx = _dot(cast(scaled, sg, types.backward), codes, (g.ndim - 1, 0), g.dtype, sg, types)
    return dx, None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def _dot(a: Any, b: Any, axes: tuple[int, int], dtype: Any, scale: Any, types: Float8) -> Any:
    """scale * the product of a and b over one axis of each, in `dtype`.

    bfloat16 leaves the unit as such; float16 has not the range for it.
    """
    if types.emulated:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    out = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    dims = (((axes[0],), (axes[1],)), ((), ()))
    y = jax.lax.dot_general(a, b, dims, preferred_element_type=out)
    return (y * scale.astype(out)).astype(dtype)
