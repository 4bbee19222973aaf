"""Quantized weights of every format, and their product in float64 by the formats' definition."""

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels import formats
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import FORMATS, Quantized
from mud_puppy.kernels.quantized_matmul import quantized_matmul
from tests.kernels.contract import compiled, differences, tolerance

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
encoded = jax.jit(quantize, static_argnames=("format", "group", "zero_points", "double"))


def weight(out, size, format, *, minimum=False, seed=0, **options) -> Quantized:
    rng = np.random.default_rng(seed)
    if minimum:
        codes = jnp.asarray(rng.integers(0, 16, (out, size)), jnp.uint8)
        d, m = (jnp.asarray(rng.normal(size=(out, size // 32)), jnp.float16) for _ in range(2))
        return formats.int4(codes, d, minimum=m)
    return encoded(jnp.asarray(rng.normal(size=(out, size)), F32), format, **options)


def inputs(rows, w, dtype, seed=0):
    rng = np.random.default_rng(seed + 1)
    x = jnp.asarray(rng.normal(size=(rows, w.shape[1])), dtype)
    return x, jnp.asarray(rng.normal(size=(rows, w.shape[0])), dtype)


def check(w, rows, dtype, implementation, seed=0):
    """Forward and dx against the definition in float64."""
    x, g = inputs(rows, w, dtype, seed)
    with jax.default_matmul_precision("highest"):  # float32 on a GPU, not TF32
        got = compiled(lambda x: quantized_matmul(x, w, implementation), (x,), g)
    want = exact(w, x, g)
    bound = tolerance(dtype, max(w.shape))
    assert max(differences(got, want)) < bound
    return got, want, bound


def close(got, want):
    """Equal but for the order of sums, which may depend on the number of rows."""
    assert max(differences([got], [want])) < tolerance(got.dtype, 512)


def exact(w, x, g):
    values, x, g = defined(w), np.asarray(x, np.float64), np.asarray(g, np.float64)
    return [x @ values.T, g @ values]


def defined(w) -> np.ndarray:
    """The weight in float64, by the table of formats.py's docstring."""
    codes, scales = np.asarray(w.codes), np.asarray(w.scales)
    if w.format in formats.PACKED:
        codes = np.stack([codes >> 4, codes & 15], -1).reshape(w.shape)
    if w.format in formats.FP8:
        codes = codes.view(np.dtype(formats.FP8[w.format])).astype(np.float64)
    if w.format == "mxfp4":
        scales = 2.0 ** (scales.astype(np.float64) - 127)
    if w.nested is not None:
        absmax = np.repeat(np.asarray(w.nested), 256)[: scales.size].reshape(scales.shape)
        scales = formats.dynamic_map()[scales] * absmax + np.asarray(w.offset)
    tables = {"nf4": formats.NF4, "mxfp4": formats.E2M1}
    values = tables[w.format][codes] if w.format in tables else codes.astype(np.float64)
    values = values.astype(np.float64).reshape(w.shape[0], scales.shape[1], -1)
    if w.zeros is not None:
        values = values - np.asarray(w.zeros)[..., None]
    elif w.format == "int4" and w.minimum is None:
        values = values - 8
    values = values * scales.astype(np.float64)[..., None]
    if w.minimum is not None:
        values = values + np.asarray(w.minimum, np.float64)[..., None]
    return values.reshape(w.shape)


CASES = {
    **{format: {"format": format} for format in FORMATS},
    "nf4 double": {"format": "nf4", "double": True},
    "nf4 of 256": {"format": "nf4", "group": 256},
    "int4 of 32": {"format": "int4", "group": 32},
    "int4 of 128": {"format": "int4", "group": 128},
    "int4 zero points": {"format": "int4", "zero_points": True},
    "int4 zero points of 32": {"format": "int4", "group": 32, "zero_points": True},
    "int4 minimum (Q4_1)": {"format": "int4", "minimum": True},
    "int8 of 64": {"format": "int8", "group": 64},
    "int8 tensor": {"format": "int8", "group": "tensor"},
    "fp8 tensor": {"format": "fp8_e4m3fn", "group": "tensor"},
    "fp8 of 128": {"format": "fp8_e5m2", "group": 128},
}
