"""Formats of quantized weights: the `Quantized` leaf of codes and scales, and its decoding.

A weight is w[out, in], stored as Hugging Face stores it, with any number of leading (layer) axes.
Each row is cut into groups of consecutive inputs that share a scale; a group never crosses a row,
so that slicing along `out` slices every leaf but the few numbers of doubly quantized scales.

    format        codes                           value of a code c
    nf4           two a byte                      NF4[c] * scale     (QLoRA, arXiv:2305.14314)
    int4          two a byte, c in 0..15          (c - zero) * scale, or c * scale + minimum;
                                                  zero is 8 when neither is stored
    mxfp4         two a byte, E2M1                E2M1[c] * 2^(scale - 127)   (OCP MX 1.0)
    int8          int8                            c * scale, or (c - zero) * scale
    fp8_e4m3fn, fp8_e5m2, fp8_e4m3fnuz, fp8_e5m2fnuz   the float8's bits, uint8     c * scale

Two a byte: the high nibble is the even element, as bitsandbytes packs. Where the size of a row is a
multiple of the group, the bytes are those of bitsandbytes' flat array (tests compare them), GPTQ's
and GGUF's codes are a permutation of nibbles away (`pack`, `unpack`), and gpt-oss' mxfp4 is
`swap_nibbles`. Encoding is `encode.quantize`; this module knows nothing of matrix products.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, UInt8

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero; bitsandbytes' numbers.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8 = {
    "fp8_e4m3fn": jnp.float8_e4m3fn,
    "fp8_e5m2": jnp.float8_e5m2,
    "fp8_e4m3fnuz": jnp.float8_e4m3fnuz,
    "fp8_e5m2fnuz": jnp.float8_e5m2fnuz,
}
FORMATS = ("nf4", "int4", "mxfp4", "int8", *FP8)
PACKED = ("nf4", "int4", "mxfp4")  # two codes a byte
GROUPS = {"nf4": 64, "int4": 64, "mxfp4": 32}  # the others have a scale for each row
NESTED = 256  # scales that share an absmax, when they are quantized themselves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight [..., out, in] in one of FORMATS; made by `quantize`, read by `dequantize`.

        codes      uint8 [..., out, in / 2] for PACKED formats; int8 or uint8 [..., out, in]
        scales     [..., out, groups] float (mxfp4: uint8 exponents; doubly quantized: uint8 codes);
                   [..., 1, 1] for one scale of the whole weight
        zeros      int4: uint8, int8: int8 [..., out, groups] zero points, or None
        minimum    int4 only: float [..., out, groups], the value of code 0 (GGUF's Q4_1), or None
        nested     doubly quantized scales only: float32 [..., ceil(out * groups / 256)], the absmax
                   of each 256 scales in row order
        offset     with `nested`: float32 [...], the mean of the scales
        layer      int32 [] or None: the leaves above are stacks, of which this one is meant and
                   read where it lies; a slice would be a copy before a kernel can read it
        format     static
        dtype      static: what `dequantize` returns unless told otherwise

    Sizes are read off the leaves, for a scan over layers strips their leading axis.
    """

    # Any: JAX rebuilds leaves with tracers, specs and None; checks belong to `encode.quantize`.
    codes: Any
    scales: Any
    zeros: Any = None
    minimum: Any = None
    nested: Any = None
    offset: Any = None
    layer: Any = None
    format: str = field(default="nf4", metadata={"static": True})
    dtype: Any = field(default=jnp.dtype("bfloat16"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for: [..., out, in]."""
        *lead, size = self.codes.shape[self.layer is not None :]
        return (*lead, 2 * size if self.format in PACKED else size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-1] // self.scales.shape[-1]


def dequantize(
    q: Quantized | tuple[Array, Array, Array | None], dtype: Any = None
) -> Float[Array, "..."]:
    """The weight that `q` stands for: products in float32, rounded once to `dtype` (None: q.dtype).

    A tuple (codes, scale, zero_point) of `quantize_per_tensor` or `quantize_per_channel` is read as
    (codes - zero_point) * scale, float32 unless `dtype` says otherwise.
    """
    if not isinstance(q, Quantized):
        if not isinstance(q, tuple) or len(q) != 3:
            raise ValueError(
                f"expected a Quantized or (codes, scale, zero point), got {type(q).__name__}"
            )
        codes, scale, zero = q
        values = codes.astype(jnp.float32)
        values = values if zero is None else values - jnp.asarray(zero, jnp.float32)
        return (values * scale).astype(dtype or jnp.float32)
    check_codes(q)
    q = sliced(q)
    values = decode(q)
    groups = values.reshape(*values.shape[:-1], q.scales.shape[-1], -1)
    scales = decoded_scales(q)[..., None]
    if q.minimum is not None:
        groups = groups * scales + q.minimum.astype(jnp.float32)[..., None]
    elif q.zeros is not None:
        groups = (groups - q.zeros.astype(jnp.float32)[..., None]) * scales
    else:
        groups = groups * scales
    return groups.reshape(values.shape).astype(dtype or q.dtype)


def check_codes(q: Quantized) -> None:
    """Kernels read bytes: ValueError for codes of another dtype than the format's."""
    wanted = jnp.dtype("int8" if q.format == "int8" else "uint8")
    if q.codes.dtype != wanted:
        raise ValueError(f"expected {q.format} codes of dtype {wanted}; got {q.codes.dtype}")


def sliced(q: Quantized) -> Quantized:
    """The same weight without `layer`, in leaves of its own."""
    if q.layer is None:
        return q
    take = partial(jax.lax.dynamic_index_in_dim, index=q.layer, keepdims=False)
    return jax.tree.map(take, replace(q, layer=None))


def decode(q: Quantized) -> Float[Array, "... out n"]:
    """float32 values of the codes alone, before scale, zero point and minimum."""
    if q.format in FP8:
        codes = jax.lax.bitcast_convert_type(q.codes, FP8[q.format])
        return codes.astype(jnp.float32)
    if q.format == "int8":
        return q.codes.astype(jnp.float32)
    codes = unpack(q.codes)
    if q.format == "int4":
        values = codes.astype(jnp.float32)
        return values - 8 if q.zeros is None and q.minimum is None else values
    return jnp.take(codebook(q.format), codes.astype(jnp.int32), axis=0, mode="clip")


def decoded_scales(q: Quantized) -> Float[Array, "... out groups"]:
    """float32 scales, whatever they are stored as."""
    if q.format == "mxfp4":
        return exponent(q.scales)
    if q.nested is None:
        return q.scales.astype(jnp.float32)
    *lead, out, groups = q.scales.shape
    absmax = jnp.repeat(q.nested, NESTED, axis=-1)[..., : out * groups]
    values = jnp.take(jnp.asarray(dynamic_map()), q.scales.astype(jnp.int32), axis=0, mode="clip")
    return values * absmax.reshape(q.scales.shape) + q.offset[..., None, None]


def codebook(format: str) -> Array:
    """float32 [16], the value of each code."""
    return jnp.asarray({"nf4": NF4, "mxfp4": E2M1}[format])


def int4(
    codes: UInt8[Array, "... out n"],
    scales: Float[Array, "... out G"],
    *,
    zeros: UInt8[Array, "..."] | None = None,
    minimum: Float[Array, "..."] | None = None,
    dtype: Any = jnp.bfloat16,
) -> Quantized:
    """int4 from codes 0..15 (one an element) made elsewhere: GPTQ's, AWQ's, GGUF's Q4_0 and Q4_1.

    Scales and minimums keep their dtype (GGUF's are float16), so that nothing is lost. Raises
    ValueError for shapes and dtypes that do not fit, and, outside of jit, for codes beyond 15.
    """
    for name, x in (("codes", codes), ("zeros", zeros)):
        if x is not None and x.dtype != jnp.uint8:
            raise ValueError(f"int4: expected {name} of dtype uint8; got {x.dtype}: cast them")
    if not isinstance(codes, Tracer) and codes.size and codes.max() > 15:
        raise ValueError(f"int4: expected codes 0..15, one an element; got {codes.max()}")
    if codes.shape[-1] % scales.shape[-1] or codes.shape[:-1] != scales.shape[:-1]:
        raise ValueError(f"scales {scales.shape} do not divide codes {codes.shape} into groups")
    for name, x in (("zeros", zeros), ("minimum", minimum)):
        if x is not None and x.shape != scales.shape:
            raise ValueError(f"expected {name} {scales.shape} as the scales, got {x.shape}")
    if zeros is not None and minimum is not None:
        raise ValueError("a group has a zero point or a minimum, not both")
    return Quantized(
        pack(codes), scales, zeros, minimum, format="int4", dtype=jnp.dtype(dtype)
    )  # fmt: skip


def pack(codes: UInt8[Array, "... n"]) -> UInt8[Array, "... bytes"]:
    """Codes 0..15 two a byte, the even one in the high nibble; larger ones spoil the next."""
    if codes.shape[-1] % 2:
        raise ValueError(f"expected an even number of codes in a row, got {codes.shape[-1]}")
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack(codes: UInt8[Array, "... bytes"]) -> UInt8[Array, "... n"]:
    """The inverse of `pack`."""
    # One broadcast and one shift: XLA makes it part of the loop that writes the decoded weight.
    shift = jax.lax.broadcast_to_rank(jnp.array([4, 0], jnp.uint8), codes.ndim + 1)
    return ((codes[..., None] >> shift) & 15).reshape(*codes.shape[:-1], -1)


def swap_nibbles(codes: Any) -> Any:
    """Between the high nibble first (ours, bitsandbytes') and the low one first (gpt-oss'): uint8
    of jax or numpy."""
    return (codes << 4) | (codes >> 4)


def exponent(e: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """2^(e - 127), float32: E8M0. 255 is NaN."""
    bits = jnp.where(e == 0, jnp.uint32(1 << 22), e.astype(jnp.uint32) << 23)
    bits = jnp.where(e == 255, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def dynamic_map(signed: bool = True) -> np.ndarray:
    """float32 [256], sorted: bitsandbytes' dynamic map (8-bit optimizers, arXiv:2110.02861).

    A sign (or one more bit of fraction), a decimal exponent of 0 to -6, and a fraction that has the
    bits the exponent leaves.
    """
    values = [0.0, 1.0]
    for i in range(7):
        # torch.linspace: a float32 step, counted from both ends.
        n = 2**i if signed else 2 ** (i + 1)
        step, k = (np.float32(1) - np.float32(0.1)) / np.float32(n), np.arange(n + 1)
        up, down = np.float64(np.float32(0.1)) + step * k, 1 - np.float64(step) * (n - k)
        edges = np.where(k < (n + 1) // 2, up, down).astype(np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means] if signed else [*means]
    return np.sort(np.array(values, np.float32))
