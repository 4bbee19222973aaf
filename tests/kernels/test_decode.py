"""The kernels' decoders: jax.numpy against the codecs, NVIDIA's text against jax.numpy.

The interpreter of Pallas cannot run inline assembly; a small one of PTX does. (AMD's text is run by
the RDNA3 emulator, in test_emulator.)
"""

import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import formats, pallas, target
from mud_puppy.kernels.quantized_matmul import decode, decode_cuda, fragment
from tests.kernels import ptx

CPU = target.Target("cpu", "cpu")
FORMATS = [(f, extra) for f in formats.FORMATS for extra in ("", "zeros", "minimum")]
FORMATS = [(f, extra) for f, extra in FORMATS if f == "int4" or not extra]


def tile(format, extra):
    """(words [8, 32], scales, zeros, minimum), all codes among them but float8's NaN, infinity."""
    rng = np.random.default_rng(0)
    codes = np.concatenate([np.arange(256), rng.integers(0, 256, 256)]).astype(np.uint8)
    if format in formats.FP8:
        codes &= 0xBF
        codes[codes == 0x80] = 0  # NaN in fnuz
    scales = jnp.asarray(rng.integers(1, 8, (8, 1)), jnp.float32) / 4
    zeros = jnp.asarray(rng.integers(0, 16, (8, 1)), jnp.float32) if extra == "zeros" else None
    minimum = jnp.asarray(rng.integers(-8, 8, (8, 1)), jnp.float32) if extra == "minimum" else None
    return jnp.asarray(codes.view(np.int16).reshape(8, 32)), scales, zeros, minimum


@pytest.mark.parametrize("format, extra", FORMATS)
def test_planes_are_the_elements_of_the_codec(format, extra):
    words, scales, zeros, minimum = tile(format, extra)
    with target.use(CPU):
        planes = decode.planes(words, format, jnp.float32, scales, zeros, minimum)
    codes = np.asarray(words).view(np.int8 if format == "int8" else np.uint8).reshape(8, 64)
    zeros = None if zeros is None else zeros.astype(jnp.uint8)
    q = formats.Quantized(jnp.asarray(codes), scales, zeros, minimum, format=format)
    if format == "mxfp4":  # the same scales as exponents
        scales = q.scales
        q = formats.Quantized(q.codes, jnp.full((8, 1), 127, jnp.uint8), format=format)
        want = np.asarray(formats.dequantize(q, jnp.float32)) * np.asarray(scales)
    else:
        want = np.asarray(formats.dequantize(q, jnp.float32))
    n = decode.per_word(format)
    assert len(planes) == n
    for e, plane in enumerate(planes):
        np.testing.assert_array_equal(plane, want[:, e::n])
        assert not np.array_equal(plane, want[:, (e + 1) % n :: n])


@pytest.mark.parametrize(
    "format, extra, dtype",
    [
        (format, extra, dtype)
        for format, extra in FORMATS
        for dtype in (jnp.bfloat16, jnp.float16)
        if (format, dtype) != ("fp8_e5m2fnuz", jnp.float16)  # refused by the plan
    ],
)
def test_nvidias_text_computes_the_planes(format, extra, dtype, monkeypatch):
    monkeypatch.setattr(pallas, "inline_asm", ptx.inline_asm)
    words, scales, zeros, minimum = tile(format, extra)
    if format in decode.TABLES:
        decode_cuda.table(format, jnp.dtype(dtype), jnp.zeros((1, 32), jnp.int32))
    got = decode_cuda.planes(words, format, dtype, scales, zeros, minimum)
    with target.use(CPU):
        want = decode.planes(words, format, jnp.float32, scales, zeros, minimum)
    if format in decode.TABLES:  # in pairs: the order that `decode.order` brings x to
        elements = jnp.stack(want, -1).reshape(8, -1, 4, 2).transpose(2, 0, 1, 3)
        want = list(elements.reshape(4, 8, -1))
    for g, w in zip(got, want, strict=True):
        # The number is rounded, then its product with the scale.
        error = np.abs(np.asarray(g, np.float32) - w).max()
        assert g.dtype == dtype and error <= float(jnp.finfo(dtype).eps) * np.abs(w).max()


@pytest.mark.parametrize("format", formats.PACKED)
def test_nvidias_text_computes_float32_exactly(format, monkeypatch):
    monkeypatch.setattr(pallas, "inline_asm", ptx.inline_asm)
    words = tile(format, "")[0]
    got = decode_cuda.floats(words, format)
    with target.use(CPU):
        want = decode.floats(words, format)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_a_wrong_text_is_seen(monkeypatch):
    """The mutation partner: a shift by a nibble too few."""
    words = tile("nf4", "")[0]
    with target.use(CPU):
        want = decode.floats(words, "nf4")
    monkeypatch.setattr(decode_cuda, "NIBBLES", (0, 0, 12, 8))
    monkeypatch.setattr(pallas, "inline_asm", ptx.inline_asm)
    got = decode_cuda.floats(words, "nf4")
    assert not np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


# `fragment_cuda`: the products of matrix instructions, and their sums.


def _operands(format, zero_points):
    """For two warps: codes, (scale, zero) of two rows, x for two instructions, sums."""
    rng = np.random.default_rng(0)

    def words(low, high):
        return jnp.asarray(rng.integers(low, high, (2, 32), dtype=np.int32))

    def floats():
        return jnp.asarray(rng.normal(size=(2, 32)), jnp.float32)

    pairs = [
        ([words(-(2**31), 2**31 - 1) for _ in range(2)],
         (floats(), words(0, 16) if zero_points else None))
        for _ in range(2)
    ]  # fmt: skip
    x = rng.normal(size=(2, 8, 2, 32, 2)).astype(jnp.bfloat16)
    xs = [[jnp.asarray(word.view(np.int32)[..., 0]) for word in of_eight] for of_eight in x]
    return pairs, xs, [floats() for _ in range(8)]


@pytest.mark.parametrize("format, zero_points", [("nf4", False), ("int4", False), ("int4", True)])
def test_nvidias_text_computes_the_products(format, zero_points, monkeypatch):
    monkeypatch.setattr(pallas, "inline_asm", ptx.inline_asm)
    half = jnp.dtype(jnp.bfloat16)
    pairs, xs, sums = _operands(format, zero_points)
    with target.use(target.Target("cuda", "sm90")):
        table = decode.table(format, half, sums[0])
        got = fragment._add(sums, format, half, table, pairs, xs)
    with target.use(CPU):
        want = fragment._add(sums, format, half, None, pairs, xs)
        # The mutation partner: the scales of the two rows exchanged.
        mixed = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])]
        wrong = fragment._add(sums, format, half, None, mixed, xs)
    bound = 2**-8 if format == "nf4" else 2**-20  # nf4's numbers are rounded to bfloat16
    for g, w, other in zip(got, want, wrong, strict=True):
        np.testing.assert_allclose(g, w, atol=128 * bound, rtol=bound)
        assert np.abs(np.asarray(other) - w).max() > 1


@pytest.mark.parametrize("count, bits", [(1, [1, 2, 4, 8, 16]), (4, [4]), (8, [])])
def test_nvidias_text_computes_the_sums(count, bits, monkeypatch):
    monkeypatch.setattr(pallas, "inline_asm", ptx.inline_asm)
    rng = np.random.default_rng(0)
    tiles = [jnp.asarray(rng.normal(size=(4, 32)), jnp.float32) for _ in range(count)]
    got = {}
    for place in (target.Target("cuda", "sm90"), CPU):
        with target.use(place):
            got[place] = fragment._added(tiles, bits, None)
    for g, w in zip(*got.values(), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)
