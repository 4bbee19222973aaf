"""Rotary position embedding: frequency tables for each scaling kind, and the rotation itself.

Kinds and formulas follow transformers' `modeling_rope_utils` (default, linear, dynamic NTK, yarn,
longrope, llama3); the tables are computed once, in numpy float32, when a config is read.
Sources: RoFormer arXiv:2104.09864; YaRN arXiv:2309.00071; LongRoPE arXiv:2402.13753; Llama 3.1's
model card.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Rope

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "original_max_position_embeddings",
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def read_rope(spec: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    """`spec` is transformers' `config.rope_parameters`; an unknown kind or key is a UserError.

    `partial_rotary_factor` of a head's numbers are rotated.
    """
    kind = spec.get("rope_type", "default")
    if kind not in _KEYS:
        raise UserError(f"rope_type '{kind}' is not supported; supported: {', '.join(_KEYS)}")
    unread = {k: v for k, v in spec.items() if k not in _KEYS[kind] | _COMMON and v is not None}
    if unread:
        raise UserError(f"rope_parameters of kind '{kind}' has keys that are not read: {spec}")
    for key in spec.keys() - {"rope_type", "type", "truncate", "short_factor", "long_factor"}:
        if not isinstance(spec[key], int | float | None):
            raise UserError(f"rope_parameters: {key} must be a number, not {spec[key]!r}")
    theta = float(spec["rope_theta"])
    part = spec.get("partial_rotary_factor")
    dim = int(head_dim * (1.0 if part is None else part))
    if dim % 2 or not 0 < dim <= head_dim:
        raise UserError(
            f"rope_parameters: {dim} of a head's {head_dim} numbers would be rotated, which is no "
            "even number of them"
        )
    inv_freq = _inv_freq(theta, dim)
    if kind == "dynamic":
        return Rope(_tuple(inv_freq), dynamic=(theta, float(spec["factor"]), max_positions))
    if kind == "linear":
        return Rope(_tuple(inv_freq / np.float32(spec["factor"])))
    if kind == "llama3":
        return Rope(_tuple(_llama3(inv_freq, spec)))
    if kind == "yarn":
        return _yarn(spec, theta, dim, max_positions)
    if kind == "longrope":
        return _longrope(spec, theta, dim, max_positions)
    return Rope(_tuple(inv_freq))


def rope_tables(
    rope: Rope, positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin, float32 [B, T, half of what is rotated]. segments: each token's example, 0 for
    padding."""
    inv_freq = jnp.asarray(rope.inv_freq, jnp.float32)
    if rope.long is not None:
        far, limit = rope.long
        inv_freq = jnp.where(_lengths(positions, segments) > limit, jnp.asarray(far), inv_freq)
    if rope.dynamic is not None:
        theta, factor, limit = rope.dynamic
        longest = _lengths(positions, segments)
        stretch = factor * jnp.maximum(longest, limit) / limit - (factor - 1)
        dim = 2 * len(rope.inv_freq)
        base = theta * stretch.astype(jnp.float32) ** (dim / (dim - 2))
        inv_freq = 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def _lengths(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None
) -> Int[Array, "B T 1"]:
    """How long each token's example is. Example by example, so that none changes with those beside
    it in the batch or the row."""
    segments = jnp.zeros_like(positions) if segments is None else segments
    return jax.vmap(_longest)(positions, segments)[..., None] + 1


def _longest(positions: Int[Array, " T"], segments: Int[Array, " T"]) -> Int[Array, " T"]:
    """The last position of each token's segment."""
    return jax.ops.segment_max(positions, segments, num_segments=len(segments) + 1)[segments]


def rotate(
    x: Float[Array, "B T n hd"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    interleaved: bool = False,
) -> Float[Array, "B T n hd"]:
    """Rotates the pairs (x[d], x[d + half]) of the first 2 half numbers, or the pairs
    (x[2 d], x[2 d + 1]) where interleaved; in float32, back in x's dtype."""
    half = cos.shape[-1]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    part = part.astype(jnp.float32)
    if interleaved:
        a, b = part[..., ::2], part[..., 1::2]
        pairs = [a * cos - b * sin, b * cos + a * sin]
        turned = jnp.stack(pairs, axis=-1).reshape(part.shape)
    else:
        a, b = jnp.split(part, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def _inv_freq(theta: float, dim: int) -> np.ndarray:
    return (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim))).astype(np.float32)


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values.astype(np.float32))


def _llama3(inv_freq: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """Long wavelengths divided by factor, short ones kept, a smooth ramp between."""
    factor, low, high = spec["factor"], spec["low_freq_factor"], spec["high_freq_factor"]
    old = spec["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (old / wavelength - low) / (high - low)
    ramp = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > old / low, inv_freq / factor, inv_freq)
    between = (wavelength >= old / high) & (wavelength <= old / low)
    return np.where(between, ramp, scaled)


def _yarn(spec: dict[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    old = spec.get("original_max_position_embeddings") or max_positions
    factor = float(spec.get("factor") or max_positions / old)

    def dimension(rotations: float) -> float:
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(spec.get("beta_fast") or 32))
    high = dimension(float(spec.get("beta_slow") or 1))
    if spec.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    inv_freq = _inv_freq(theta, dim)
    mixed = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    return Rope(_tuple(mixed), scale=_yarn_scale(spec, factor))


def _yarn_scale(spec: dict[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if spec.get("attention_factor") is not None:
        return float(spec["attention_factor"])
    if spec.get("mscale") and spec.get("mscale_all_dim"):
        return mscale(float(spec["mscale"])) / mscale(float(spec["mscale_all_dim"]))
    return mscale(1.0)


def _longrope(spec: dict[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    old = spec.get("original_max_position_embeddings") or max_positions
    factor = float(spec.get("factor") or max_positions / old)
    scale = spec.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    tables = []
    for key in ("short_factor", "long_factor"):
        stretch = spec.get(key)
        if not isinstance(stretch, list) or len(stretch) != dim // 2:
            raise UserError(f"rope_parameters: {key} must be a list of {dim // 2} numbers")
        powers = theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
        tables.append(_tuple(1.0 / (np.asarray(stretch, np.float32) * powers)))
    return Rope(tables[0], scale=float(scale), long=(tables[1], int(old)))
