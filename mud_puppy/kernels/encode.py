"""`quantize`: a float weight to codes and scales, in any of `formats.FORMATS`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mud_puppy.kernels.formats import (
    E2M1,
    FORMATS,
    FP8,
    GROUPS,
    NESTED,
    NF4,
    PACKED,
    Quantized,
    dynamic_map,
    exponent,
    pack,
)


def quantize(
    w: Array,
    format: str = "nf4",
    *,
    group: int | str | None = None,
    zero_points: bool = False,
    double: bool = False,
) -> Quantized:
    """The float weight w [..., out, in] in one of FORMATS ("fp8" means fp8_e4m3fn).

    group: inputs that share a scale; "row" for one a row, "tensor" for one a weight (int8 and fp8
    only). None is GROUPS' or "row". A row that is no multiple of the group is a ValueError: there
    is no padding, for a padded weight has another shape than the model's.
    zero_points: int4 with a zero point a group, for groups whose values are not centred.
    double: quantizes nf4's scales too, by bitsandbytes' 8-bit map: 4.13 instead of 4.5 bits.
    """
    format = "fp8_e4m3fn" if format == "fp8" else format
    if format not in FORMATS:
        raise ValueError(f"unknown format '{format}'; formats are {', '.join(FORMATS)}, fp8")
    if zero_points and format != "int4":
        raise ValueError(f"zero_points is for int4, not {format}")
    if double and format != "nf4":
        raise ValueError(f"double is for nf4, whose scales it quantizes, not {format}")
    if not jnp.issubdtype(w.dtype, jnp.floating) or w.ndim < 2:
        raise ValueError(f"expected a float weight [..., out, in], got {w.dtype}{list(w.shape)}")
    grouped = _groups(w, format, group)
    if format == "nf4":
        q = _nf4(grouped, double)
    elif format == "int4":
        q = _int4(grouped, zero_points)
    elif format == "mxfp4":
        q = _mxfp4(grouped)
    else:
        q = _eight_bits(grouped, format, whole=group == "tensor")
    codes = q.pop("codes").reshape(w.shape)
    codes = pack(codes) if format in PACKED else codes
    return Quantized(codes, **q, format=format, dtype=jnp.dtype(w.dtype))


# Encoders: groups [..., out, G, group] -> leaves of Quantized, codes with the shape of the groups.


def _groups(w: Array, format: str, group: int | str | None) -> Array:
    size = w.shape[-1]
    if group in ("row", "tensor"):
        if format in GROUPS:
            raise ValueError(f"{format} has groups of a fixed size, not group='{group}'")
        return w.astype(jnp.float32)[..., None, :]
    group = GROUPS.get(format, size) if group is None else group
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"expected a group size, 'row' or 'tensor', got group={group!r}")
    if format == "mxfp4" and group != 32:
        raise ValueError(f"mxfp4 has groups of 32 by its definition, not {group}")
    if format in PACKED and group % 2:
        raise ValueError(f"expected an even group for {format}, got {group}")
    if size % group:
        fitting = [g for g in (16, 32, 64, 128, 256) if size % g == 0 and g < size]
        hint = f"groups that fit: {fitting}" if fitting else "leave this weight unquantized"
        raise ValueError(f"rows of {size} are no multiple of the group of {group}; {hint}")
    return w.astype(jnp.float32).reshape(*w.shape[:-1], size // group, group)


def _nf4(x: Array, double: bool) -> dict[str, Array]:
    absmax = jnp.abs(x).max(-1)
    # bitsandbytes multiplies by the reciprocal; dividing would move codes at the boundaries.
    scaled = jnp.clip(x * (1 / jnp.maximum(absmax, 1e-38))[..., None], -1, 1)
    codes = _nearest(scaled, NF4)
    if not double:
        return {"codes": codes, "scales": absmax}
    *lead, out, groups = absmax.shape
    offset = absmax.mean((-2, -1))
    flat = (absmax - offset[..., None, None]).reshape(*lead, out * groups)
    tail = -flat.shape[-1] % NESTED
    blocks = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, tail)]).reshape(*lead, -1, NESTED)
    nested = jnp.abs(blocks).max(-1)
    scaled = jnp.clip(blocks * (1 / jnp.maximum(nested, 1e-38))[..., None], -1, 1)
    scales = _nearest(scaled, dynamic_map()).reshape(*lead, -1)[..., : out * groups]
    return {
        "codes": codes,
        "scales": scales.reshape(absmax.shape),
        "nested": nested,
        "offset": offset,
    }


def _nearest(x: Array, values: np.ndarray) -> Array:
    """uint8 index of the nearest of the sorted values; the lower one at a tie."""
    bounds = (values[:-1] + values[1:]) / np.float32(2)
    # Comparing with all is faster for few; for 256 values XLA's GPU compiler (0.11.2) hung on it.
    method = "compare_all" if len(bounds) < 16 else "scan"
    found = jnp.searchsorted(jnp.asarray(bounds), x, side="left", method=method)
    return found.astype(jnp.uint8)


def _int4(x: Array, zero_points: bool) -> dict[str, Array]:
    if not zero_points:
        scales = jnp.abs(x).max(-1) / 7
        codes = _rounded(x, scales, 0, -7, 7) + 8
        return {"codes": codes.astype(jnp.uint8), "scales": scales}
    low, high = jnp.minimum(x.min(-1), 0), jnp.maximum(x.max(-1), 0)
    scales = (high - low) / 15
    zeros = _rounded(-low[..., None], scales, 0, 0, 15)[..., 0]
    codes = _rounded(x, scales, zeros[..., None], 0, 15)
    return {
        "codes": codes.astype(jnp.uint8), "scales": scales, "zeros": zeros.astype(jnp.uint8)
    }  # fmt: skip


def _rounded(x: Array, scales: Array, zero: Any, low: int, high: int) -> Array:
    steps = x / jnp.where(scales == 0, 1, scales)[..., None]
    return jnp.clip(jnp.round(steps) + zero, low, high)


def _mxfp4(x: Array) -> dict[str, Array]:
    absmax = jnp.abs(x).max(-1)
    # OCP MX 6.3: the exponent of the largest value less that of the largest element, 4 = 2^2.
    _, power = jnp.frexp(absmax)
    e = jnp.clip(jnp.where(absmax == 0, 0, power - 1 - 2 + 127), 0, 254).astype(jnp.uint8)
    magnitude = jnp.abs(x) / exponent(e)[..., None]
    # Round to nearest, ties to the even code: the midpoint above an odd code goes up.
    middles = (E2M1[:7] + E2M1[1:8]) / 2
    above = [magnitude >= m if i % 2 else magnitude > m for i, m in enumerate(middles)]
    codes = sum(a.astype(jnp.uint8) for a in above)
    # A scale of 255 is NaN: what is no number in a group must not become one.
    e = jnp.where(jnp.isfinite(absmax), e, jnp.uint8(255))
    return {"codes": codes | (jnp.signbit(x).astype(jnp.uint8) << 3), "scales": e}


def _eight_bits(x: Array, format: str, whole: bool) -> dict[str, Array]:
    largest = 127.0 if format == "int8" else float(jnp.finfo(FP8[format]).max)
    absmax = jnp.abs(x).max(-1)
    absmax = absmax.max((-2, -1), keepdims=True, initial=0) if whole else absmax
    scales = absmax / largest
    steps = x / jnp.where(scales == 0, 1, scales)[..., None]
    if format == "int8":
        return {"codes": jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), "scales": scales}
    codes = jnp.clip(steps, -largest, largest).astype(FP8[format])
    return {"codes": jax.lax.bitcast_convert_type(codes, jnp.uint8), "scales": scales}
