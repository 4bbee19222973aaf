"""The codecs of quantized weights against their definitions and against those who set them."""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.kernels import formats, quantized_matmul
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import FORMATS, Quantized, dequantize


def weights(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


quantized = jax.jit(quantize, static_argnames=("format", "group", "zero_points", "double"))
values = jax.jit(dequantize)


def rows_of(q: Quantized, a: int, b: int) -> Quantized:
    """Rows a..b of every leaf that has rows."""
    return jax.tree.map(lambda x: x[..., a:b, :], q)


# What a format can hold, it holds; what it cannot, it rounds to the nearest.

LARGEST_STEP = {  # the widest gap between neighbouring values, over twice the group's largest
    "nf4": (1 - 0.6961928) / 2, "int4": 0.5 / 7, "mxfp4": 1 / 4, "int8": 0.5 / 127,
    "fp8_e4m3fn": 1 / 28, "fp8_e5m2": 1 / 14, "fp8_e4m3fnuz": 1 / 30, "fp8_e5m2fnuz": 1 / 14,
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.sampled_from([(1, 64), (5, 192)]), st.integers(0, 10**6))
def test_values_come_back_to_the_nearest_code(format, shape, seed):
    rows = shape[0]
    w = weights(*shape, seed=seed, scale=10.0 ** (seed % 7 - 3))
    q = quantized(w, format)
    assert q.shape == w.shape
    got = np.asarray(values(q))
    assert got.dtype == np.float32
    largest = np.abs(w.reshape(rows, -1, q.group)).max(-1, keepdims=True)
    error = np.abs(got - w).reshape(rows, -1, q.group) / largest
    assert error.max() <= LARGEST_STEP[format] + 1e-6
    # The values of the codes are fixed points (but of mxfp4 with a group whose top was rounded).
    if format != "mxfp4":
        again = values(quantized(got, format))
        np.testing.assert_allclose(again, got, rtol=3e-7)


@pytest.mark.parametrize("format", FORMATS)
def test_a_worse_code_would_be_seen(format):
    """The mutation partner: codes without their upper bit are out of the bound."""
    w = weights(4, 128)
    q = quantize(jnp.asarray(w), format)
    moved = q.codes ^ (0x88 if format in formats.PACKED else jnp.array(0x80).astype(q.codes.dtype))
    other = dequantize(Quantized(moved, q.scales, format=format), jnp.float32)
    largest = np.abs(w.reshape(4, -1, q.group)).max(-1, keepdims=True)
    error = np.abs(np.asarray(other) - w).reshape(4, -1, q.group) / largest
    assert error.max() > LARGEST_STEP[format]


def test_nf4_is_the_nearest_of_its_table():
    w = weights(8, 256)
    blocks = w.reshape(-1, 64) / np.abs(w.reshape(-1, 64)).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] - formats.NF4).argmin(-1).reshape(8, 256)
    q = quantize(jnp.asarray(w), "nf4")
    assert np.array_equal(formats.unpack(q.codes), nearest)
    assert np.array_equal(q.codes, nearest[:, ::2] << 4 | nearest[:, 1::2])
    np.testing.assert_array_equal(q.scales, np.abs(w.reshape(8, 4, 64)).max(-1))


def test_double_quantized_scales():
    w = weights(40, 1024, scale=0.02)
    plain, double = (quantized(w, "nf4", double=d) for d in (False, True))
    assert np.array_equal(plain.codes, double.codes)
    assert double.scales.dtype == jnp.uint8 and double.nested.shape == (3,)  # 640 scales
    error = np.abs(formats.decoded_scales(double) - plain.scales)
    # The map's largest gap is 0.9 / 64 of each block's absmax, and it rounds to the nearest.
    assert error.max() <= 0.9 / 64 / 2 * np.asarray(double.nested).max() * 1.001
    size = sum(x.nbytes for x in jax.tree.leaves(double)) * 8 / w.size
    assert 4.12 < size < 4.14


def test_the_dynamic_map():
    values = formats.dynamic_map()
    assert values.shape == (256,) and np.all(np.diff(values) > 0)
    assert values[127] == 0 and values[-1] == 1 and values[0] == np.float32(-0.99296875)
    np.testing.assert_array_equal(-values[:127][::-1], values[128:255])


BITSANDBYTES = """
import sys
sys.path.insert(0, sys.argv[1])
import bitsandbytes.functional as F, numpy as np, torch
w = np.load(sys.argv[2])
out = {"map": F.create_dynamic_map().numpy()}
for double in (False, True):
    codes, state = F.quantize_4bit(torch.tensor(w), quant_type="nf4", compress_statistics=double)
    out |= {f"codes{double}": codes.numpy(), f"absmax{double}": state.absmax.numpy(),
            f"values{double}": F.dequantize_4bit(codes, state).numpy()}
    if double:
        out |= {"nested": state.state2.absmax.numpy(), "offset": state.offset.numpy()}
np.savez(sys.argv[3], **out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 128), (48, 576), (256, 2048)])
def test_nf4_is_bitsandbytes(shape, tmp_path):
    """Codes, scales and decoded values bit for bit; MUD_PUPPY_BNB names a folder that has it."""
    folder = bitsandbytes_folder()
    w = weights(*shape, scale=0.02)
    np.save(tmp_path / "w.npy", w)
    command = [sys.executable, "-c", BITSANDBYTES, folder, tmp_path / "w.npy", tmp_path / "o.npz"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = np.load(tmp_path / "o.npz")
    assert np.array_equal(theirs["map"], formats.dynamic_map())
    for double in (False, True):
        q = quantize(jnp.asarray(w), "nf4", double=double)
        assert np.array_equal(theirs[f"codes{double}"].reshape(q.codes.shape), q.codes)
        # Their mean sums in another order, which can move a scale's code by one.
        assert np.mean(theirs[f"absmax{double}"].reshape(q.scales.shape) != q.scales) < 1e-2
        extra = {"nested": theirs["nested"], "offset": theirs["offset"]} if double else {}
        given = Quantized(
            jnp.asarray(theirs[f"codes{double}"].reshape(q.codes.shape)),
            jnp.asarray(theirs[f"absmax{double}"].reshape(q.scales.shape)),
            **{k: jnp.asarray(v) for k, v in extra.items()},
        )
        np.testing.assert_array_equal(dequantize(given, jnp.float32), theirs[f"values{double}"])


def bitsandbytes_folder() -> str:
    folder = os.environ.get("MUD_PUPPY_BNB", "")
    if not (Path(folder) / "bitsandbytes").exists():
        pytest.fail("pip install --no-deps --target FOLDER bitsandbytes, then MUD_PUPPY_BNB=FOLDER")
    return folder


def test_gguf_q4_1_is_held_without_loss():
    """Blocks of 32: d and m in float16, byte i holds element i (low) and i + 16 (high)."""
    w = weights(24, 256, scale=0.1)
    stored = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q4_1)
    blocks = stored.reshape(24, 8, 20)
    d, m = (blocks[..., i : i + 2].copy().view(np.float16)[..., 0] for i in (0, 2))
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1).reshape(24, 256)
    q = formats.int4(jnp.asarray(codes), jnp.asarray(d), minimum=jnp.asarray(m))
    want = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), want)
    wrong = formats.int4(jnp.asarray(codes), jnp.asarray(d), minimum=jnp.asarray(d))
    assert np.abs(np.asarray(dequantize(wrong, jnp.float32)) - want).max() > 0.1


def test_int4_zero_points_are_gptqs():
    """(c - z) * s with c, z in 0..15; a row far from zero is held better than symmetrically."""
    w = weights(16, 256) + 3 * (np.arange(16)[:, None] - 8)
    q = quantize(jnp.asarray(w), "int4", group=128, zero_points=True)
    codes, zeros = np.asarray(formats.unpack(q.codes), np.float32), np.asarray(q.zeros, np.float32)
    want = (codes.reshape(16, 2, 128) - zeros[..., None]) * np.asarray(q.scales)[..., None]
    np.testing.assert_array_equal(dequantize(q), want.reshape(16, 256))
    symmetric = quantize(jnp.asarray(w), "int4", group=128)
    error, worse = (np.abs(np.asarray(dequantize(x)) - w).mean() for x in (q, symmetric))
    assert error < 0.8 * worse


def test_mxfp4_is_ocps():
    """Every code, and rounding as ml_dtypes' float4_e2m1fn rounds (to even)."""
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(formats.E2M1, codes.view(ml_dtypes.float4_e2m1fn))
    w = weights(16, 256)
    w[0, :32] = np.linspace(-6, 6, 32) / 4  # ties
    w[1, :32] = 0
    q = quantize(jnp.asarray(w), "mxfp4")
    scales = np.asarray(q.scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    groups = w.reshape(16, 8, 32)
    powers = np.floor(np.log2(np.abs(groups[2:]).max(-1)))
    np.testing.assert_array_equal(np.log2(scales[2:] * 4), powers)
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = np.where(groups == 0, 0, groups / scales[..., None]).clip(-6, 6)
    want = rounded.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scales[..., None]
    np.testing.assert_array_equal(dequantize(q), want.reshape(16, 256))


def test_exponents():
    e = np.arange(256, dtype=np.uint8)
    want = e.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = np.asarray(formats.exponent(jnp.asarray(e)))
    np.testing.assert_array_equal(got[1:], want[1:])
    assert got[0] in (0, want[0])  # 2^-127 is a denormal, which some devices flush


@pytest.mark.parametrize("format", formats.FP8)
def test_fp8_is_the_dtypes_own(format):
    dtype = formats.FP8[format]
    w = weights(4, 64)
    q = quantize(jnp.asarray(w), format, group="tensor")
    assert q.codes.dtype == jnp.uint8 and q.scales.shape == (1, 1)
    scale = np.float32(np.abs(w).max()) / np.float32(jnp.finfo(dtype).max)
    want = (w / scale).astype(dtype).astype(np.float32) * scale
    np.testing.assert_allclose(dequantize(q), want, rtol=1e-6)


def test_fp8_is_short_for_ocps():
    assert quantize(jnp.ones((2, 32)), "fp8").format == "fp8_e4m3fn"


# Leading axes, slices, dtypes.


@pytest.mark.parametrize("format, double", [*((f, False) for f in FORMATS), ("nf4", True)])
def test_a_stack_is_quantized_as_its_layers_are(format, double):
    w = jnp.asarray(weights(3, 16, 128), jnp.bfloat16)
    stack = quantized(w, format, double=double)
    assert stack.shape == (3, 16, 128) and stack.dtype == jnp.bfloat16
    _, rows = jax.lax.scan(lambda c, q: (c, dequantize(q)), 0, stack)
    for i in range(3):
        alone = quantized(w[i], format, double=double)
        layer = jax.tree.map(lambda x, i=i: x[i], stack)
        assert jax.tree.structure(alone) == jax.tree.structure(layer)
        assert layer.shape == (16, 128) and values(layer).dtype == jnp.bfloat16
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(layer), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), 1e-6)
        np.testing.assert_array_equal(rows[i], values(layer))
    both = jax.vmap(dequantize)(stack)
    np.testing.assert_array_equal(both, rows)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_can_be_sliced(format):
    q = quantized(weights(16, 256), format)
    np.testing.assert_array_equal(values(rows_of(q, 4, 9)), values(q)[4:9])


def test_under_jit_and_as_shapes():
    shapes = jax.eval_shape(lambda w: quantize(w, "nf4", double=True), jnp.ones((2, 8, 128)))
    assert shapes.shape == (2, 8, 128) and shapes.ndim == 3
    assert shapes.codes.shape == (2, 8, 64) and shapes.group == 64


# Per-tensor and per-channel triples are read by the same name.


def test_triples():
    codes = jnp.array([[0, 10], [20, 30]], jnp.int8)
    got = dequantize((codes, jnp.array([[0.5], [2.0]]), jnp.array([[10], [0]])))
    np.testing.assert_array_equal(got, [[-5, 0], [40, 60]])
    np.testing.assert_array_equal(dequantize((codes, jnp.float32(2), None)), codes * 2.0)
    assert dequantize((codes, jnp.float32(2), None), jnp.bfloat16).dtype == jnp.bfloat16


# Refusals.


@pytest.mark.parametrize(
    "shape, format, options, words",
    [
        ((8, 96), "nf4", {}, "rows of 96 are no multiple of the group of 64; groups that fit"),
        ((8, 50), "mxfp4", {}, "leave this weight unquantized"),
        ((8, 64), "nf5", {}, "unknown format 'nf5'"),
        ((64,), "nf4", {}, "float weight"),
        ((8, 64), "int8", {"zero_points": True}, "int4"),
        ((8, 64), "int4", {"double": True}, "nf4"),
        ((8, 64), "mxfp4", {"group": 64}, "32 by its definition"),
        ((8, 64), "nf4", {"group": "row"}, "fixed size"),
        ((8, 64), "int8", {"group": 0}, "group size"),
    ],
)
def test_refusals(shape, format, options, words):
    with pytest.raises(ValueError, match=words):
        quantize(jnp.ones(shape), format, **options)


def test_codes_are_no_weights():
    with pytest.raises(ValueError, match="float weight"):
        quantize(jnp.ones((8, 64), jnp.int8), "int8")


def test_int4_checks_its_parts():
    codes, scales = jnp.zeros((4, 64), jnp.uint8), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="not both"):
        formats.int4(codes, scales, zeros=jnp.zeros((4, 2), jnp.uint8), minimum=scales)
    with pytest.raises(ValueError, match="divide"):
        formats.int4(codes, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="expected minimum"):
        formats.int4(codes, scales, minimum=jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="even number"):
        formats.pack(jnp.zeros((2, 3), jnp.uint8))


def test_codes_that_are_none():
    """As users have the functions, without the type checks of tests."""
    int4, of_bytes = inspect.unwrap(formats.int4), jnp.zeros((4, 64), jnp.uint8)
    scales = jnp.ones((4, 1))
    with pytest.raises(ValueError, match=r"codes 0\.\.15, one an element; got 16"):
        int4(of_bytes.at[2, 3].set(16), scales)
    with pytest.raises(ValueError, match="codes of dtype uint8; got int32"):
        int4(of_bytes.astype(jnp.int32), scales)
    with pytest.raises(ValueError, match="zeros of dtype uint8; got float32"):
        int4(of_bytes, scales, zeros=scales)
    assert int4(of_bytes.at[2, 3].set(15), scales).codes.max() == 15
    for codes, format, wanted in ((jnp.int32, "nf4", "uint8"), (jnp.uint8, "int8", "int8")):
        q = replace(quantize(jnp.ones((4, 64)), format), codes=jnp.zeros((4, 64), codes))
        for call in (lambda q: dequantize(q), lambda q: quantized_matmul(jnp.ones((2, 64)), q)):
            with pytest.raises(ValueError, match=f"{format} codes of dtype {wanted}"):
                call(q)


def test_nibbles():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (5, 32)), jnp.uint8)
    np.testing.assert_array_equal(formats.unpack(formats.pack(codes)), codes)
    swapped = formats.unpack(formats.swap_nibbles(formats.pack(codes)))
    np.testing.assert_array_equal(swapped.reshape(5, 16, 2)[..., ::-1].reshape(5, 32), codes)
