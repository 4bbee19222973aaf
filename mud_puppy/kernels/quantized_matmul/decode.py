"""Codes to numbers inside the kernel: a tile of 16-bit words becomes planes of x's dtype.

A word holds `per_word` consecutive elements of a row, four codes of 4 bits or two of 8. Plane e has
element e of every word: it is multiplied with x[:, e::per_word]. (Where a chip decodes to other
planes, `order` brings x to them.)
NVIDIA's and AMD's instructions for it stand in `decode_cuda` and `decode_rocm`; here is the same in
jax.numpy, which the interpreter runs, and AMD for the formats that need no table.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from mud_puppy.kernels import formats, target
from mud_puppy.kernels.quantized_matmul import decode_cuda, decode_rocm

# Where the codes of a word stand: byte 0 holds elements 0 (high nibble) and 1, byte 1 the others.
NIBBLES = (4, 0, 12, 8)
BYTES = (0, 8)
TABLES = {"nf4": formats.NF4, "mxfp4": formats.E2M1}


def per_word(format: str) -> int:
    return 4 if format in formats.PACKED else 2


def planes(words: Any, format: str, dtype: Any, scales: Any, zeros: Any, minimum: Any) -> list[Any]:
    """per_word tiles of `dtype`, shaped as the int16 tile `words`.

    scales, zeros and minimum are float32 and broadcast to it; scales are None where they are
    applied elsewhere, and so are zeros and minimum where the format has none.
    """
    if target.current().platform == "cuda":
        return decode_cuda.planes(words, format, dtype, scales, zeros, minimum)
    if target.current().platform == "rocm":
        words = decode_rocm.held(words)
    if format in TABLES and target.current().platform == "rocm":
        values = decode_rocm.table(words, TABLES[format], dtype)
    else:
        values = _values(words, format)
    if format == "int4" and zeros is None and minimum is None:
        zeros = 8.0
    return [_rounded(_scaled(v.astype(jnp.float32), scales, zeros, minimum), dtype) for v in values]


def table(format: str, dtype: Any, lane: Any) -> Any:
    """What `planes` needs in shared memory, put there at the kernel's start; None where nothing.

    `lane` is any int32 tile [warps, 32]; the int32 tile that is returned must reach the result.
    """
    if target.current().platform == "cuda" and format in TABLES:
        return decode_cuda.table(format, jnp.dtype(dtype), lane)
    return None


def order(x: Any, format: str) -> Any:
    """x[M, in] by planes: [per_word * M, words]."""
    M, n = x.shape[0], per_word(format)
    if target.current().platform == "cuda" and format in TABLES:
        # There plane e has the two elements of byte e of every two words.
        return x.reshape(M, -1, n, 2).transpose(2, 0, 1, 3).reshape(n * M, -1)
    return x.reshape(M, -1, n).transpose(2, 0, 1).reshape(n * M, -1)


def floats(words: Any, format: str) -> list[Any]:
    """The planes of a 4-bit format without scale, float32; int4 around its zero point of 8."""
    if target.current().platform == "cuda":
        return decode_cuda.floats(words, format)
    if target.current().platform == "rocm" and format in TABLES:
        return [
            v.astype(jnp.float32) for v in decode_rocm.table(words, TABLES[format], jnp.bfloat16)
        ]
    values = [v.astype(jnp.float32) for v in _values(words, format)]
    return [v - 8.0 for v in values] if format == "int4" else values


def _values(words: Any, format: str) -> list[Any]:
    bits = words.astype(jnp.int32)
    if format in formats.PACKED:
        codes = [(bits >> shift) & 15 for shift in NIBBLES]
        return [look_up(c, TABLES[format]) if format in TABLES else c for c in codes]
    if format == "int8":
        return [(bits << (24 - shift)) >> 24 for shift in BYTES]
    return [_float8((bits >> shift) & 255, format) for shift in BYTES]


def look_up(codes: Any, table: Any) -> Any:
    value = jnp.float32(table[0])
    for code in range(1, 16):
        value = jnp.where(codes == code, jnp.float32(table[code]), value)
    return value


def _float8(codes: Any, format: str) -> Any:
    """The float8 of these bits as float32; the codes of e4m3's NaN become numbers."""
    magnitude, negative = codes & 127, codes > 127
    if format == "fp8_e5m2fnuz":  # its largest exponent is float16's infinity
        lowest = 2.0**-16
        normal = lax.bitcast_convert_type((magnitude << 21) + (111 << 23), jnp.float32)
        value = jnp.where(magnitude < 4, 2 * (normal - lowest), normal)
        return jnp.where(negative, -value, value)
    shift, power = FLOAT8[format]
    bits = (magnitude << shift) | ((codes & 128) << 8)
    # float16 holds the others, times a power of two; float32's denormals might be flushed.
    half = lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)
    return half.astype(jnp.float32) * 2.0**power


# Places to shift a magnitude left into float16, and the power of two that is left over.
FLOAT8 = {"fp8_e4m3fn": (7, 8), "fp8_e5m2": (8, 0), "fp8_e4m3fnuz": (7, 7)}


def _scaled(values: Any, scales: Any, zeros: Any, minimum: Any) -> Any:
    if zeros is not None:
        values = values - zeros
    if scales is not None:
        values = values * scales
    return values if minimum is None else values + minimum


def _rounded(values: Any, dtype: Any) -> Any:
    if dtype != jnp.bfloat16 or target.current().platform == "cpu":
        return values.astype(dtype)
    # Two instructions where a conversion takes six; half a unit is rounded away from zero.
    bits = lax.bitcast_convert_type(values, jnp.int32) + 0x8000
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.int16), jnp.bfloat16)
