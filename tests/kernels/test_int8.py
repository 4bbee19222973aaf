"""Integers: exact products, scales and zero points, norms that end in int8."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.kernels import (
    dequantize,
    fbgemm,
    qgemm,
    quantize_per_channel,
    quantize_per_tensor,
    quantized_layernorm,
    quantized_rmsnorm,
    selfcheck,
    target,
)
from mud_puppy.kernels.encode import quantize

module = importlib.import_module("mud_puppy.kernels.qgemm")


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def test_per_tensor():
    x = floats(6, 40)
    got, scale, zero = quantize_per_tensor(jnp.asarray(x))
    assert got.dtype == jnp.int8 and scale.shape == () and zero is None
    np.testing.assert_allclose(scale, np.abs(x).max() / 127, rtol=1e-6)
    np.testing.assert_array_equal(got, np.round(x / np.asarray(scale)))
    assert np.abs(dequantize((got, scale, zero)) - x).max() <= np.asarray(scale) / 2 * 1.0001


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_hold_a_shifted_range(bits):
    x = np.abs(floats(6, 40)) + 1
    triple = quantize_per_tensor(jnp.asarray(x), bits=bits, symmetric=False)
    low, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= np.min(triple[0]) and np.max(triple[0]) <= top
    step = x.max() / (2**bits - 1)  # the range starts at 0, which has a code
    assert np.abs(dequantize(triple) - x).max() <= step / 2 * 1.01
    zeros = dequantize((triple[2].astype(jnp.int8), triple[1], triple[2]))
    assert zeros == 0
    symmetric = quantize_per_tensor(jnp.asarray(x), bits=bits)
    assert np.abs(dequantize(symmetric) - x).max() > 1.5 * step / 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_is_per_tensor_of_each_channel(axis, symmetric):
    x = floats(3, 4, 10) * np.arange(1, 5)[:, None]
    triple = quantize_per_channel(jnp.asarray(x), axis, symmetric=symmetric)
    each = np.moveaxis(x, axis, 0)
    whole = np.moveaxis(np.asarray(dequantize(triple)), axis, 0)
    for i in range(len(each)):
        alone = quantize_per_tensor(jnp.asarray(each[i]), symmetric=symmetric)
        np.testing.assert_allclose(whole[i], dequantize(alone), rtol=1e-6, atol=1e-7)


def test_zeros_have_a_scale():
    got, scale, _ = quantize_per_tensor(jnp.zeros((2, 3)))
    assert scale == 1 and not np.any(got)


# int32 sums are exact.


def product(a, b, implementation):
    return np.asarray(qgemm(a, b, dtype=jnp.int32, implementation=implementation))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_drawn_shapes_are_exact(M, n, k, seed):
    a, b = codes(M, 32 * k, seed=seed), codes(16 * n, 32 * k, seed=seed + 1)
    want = a.astype(np.int64) @ b.T.astype(np.int64)
    implementation = ("pallas", "xla")[seed % 2]
    assert np.array_equal(product(jnp.asarray(a), jnp.asarray(b), implementation), want)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_the_largest_sums_are_exact(implementation):
    """float32 would lose them: 4,096 products of 2^14 are 2^26."""
    a, b = np.full((16, 4096), -128, np.int8), np.full((16, 4096), -128, np.int8)
    b[:, 0] = 127
    want = a.astype(np.int64) @ b.T.astype(np.int64)
    assert np.array_equal(product(jnp.asarray(a), jnp.asarray(b), implementation), want)
    assert not np.array_equal(product(jnp.asarray(a), jnp.asarray(a), implementation), want)


@pytest.mark.parametrize("zeros", ["", "a", "b", "ab"])
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_scales_and_zero_points(implementation, zeros):
    x, w = floats(10, 64) + 1, floats(32, 64, seed=1) - 0.5
    qx = quantize_per_channel(jnp.asarray(x), 0, symmetric="a" not in zeros)
    qw = quantize_per_channel(jnp.asarray(w), 0, symmetric="b" not in zeros)
    got = qgemm(qx[0], qw[0], qx[1], qw[1], qx[2], qw[2], implementation=implementation)
    want = np.asarray(dequantize(qx), np.float64) @ np.asarray(dequantize(qw), np.float64).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if zeros:  # the mutation partner: forgetting a zero point is seen
        wrong = qgemm(qx[0], qw[0], qx[1], qw[1])
        assert np.abs(wrong - want).max() > 1


def test_qgemm_is_int8_in_the_program():
    a, b = jnp.asarray(codes(16, 64)), jnp.asarray(codes(16, 64))
    with target.use(target.Target("cpu", "cpu")):
        text = jax.jit(qgemm).lower(a, b).as_text()
    assert "tensor<16x64xi8>, tensor<16x64xi8>) -> tensor<16x16xi32>" in text


def test_a_wrong_integer_product_is_refused_by_name(monkeypatch, caplog):
    """As XLA's on an H100, which gave twice the sum."""
    rocm = target.Target("rocm", "gfx1100")
    monkeypatch.setattr(target, "_device", lambda: rocm)
    monkeypatch.setattr(selfcheck, "_faults", {})
    right = module._xla_int8
    monkeypatch.setattr(module, "_xla_int8", lambda a, b: 2 * right(a, b))
    a, b = codes(7, 1500), codes(5, 1500, seed=1)
    with caplog.at_level("INFO", "mud_puppy"):
        got = product(jnp.asarray(a), jnp.asarray(b), "xla")
    assert np.array_equal(got, a.astype(np.int64) @ b.T.astype(np.int64))
    assert "XLA's product of int8 failed its self-check" in caplog.text


@pytest.mark.parametrize("K", [32, 1024, 3000])
def test_parts_are_exact(K):
    a, b = codes(5, K), codes(6, K, seed=1)
    a[0], b[0] = -128, -128
    got = module._in_parts(jnp.asarray(a), jnp.asarray(b))
    assert np.array_equal(got, a.astype(np.int64) @ b.T.astype(np.int64))


def test_refusals():
    a = jnp.zeros((4, 32), jnp.int8)
    with pytest.raises(ValueError, match=r"expected b \[N, 32\]"):
        qgemm(a, jnp.zeros((4, 16), jnp.int8))
    with pytest.raises(ValueError, match="one number or 4"):
        qgemm(a, a, jnp.ones(3))
    with pytest.raises(ValueError, match="multiples of"):
        qgemm(a, a, implementation="pallas")
    with pytest.raises(ValueError, match="implementation 'reference' is none of"):
        qgemm(a, a, implementation="reference")
    with pytest.raises(ValueError, match="2 to 8 bits"):
        quantize_per_tensor(jnp.ones(3), bits=16)
    with pytest.raises(ValueError, match="no axis 2"):
        quantize_per_channel(jnp.ones((2, 3)), 2)


# fbgemm: bias and activation on any weight.


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_fbgemm(activation, bias):
    x, w, b = jnp.asarray(floats(2, 3, 64)), jnp.asarray(floats(32, 64)), jnp.asarray(floats(32))
    q = quantize(w, "int8")
    act = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}.get(activation)

    def want(x):
        y = jnp.matmul(x, dequantize(q).T, precision="highest") + (b if bias else 0)
        return y if act is None else act(y)

    def got(x):
        return fbgemm(x, q, b if bias else None, activation)

    np.testing.assert_allclose(got(x), want(x), rtol=1e-5, atol=1e-5)
    gradients = [jax.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in (got, want)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-3)


def test_fbgemm_refuses():
    x, w = jnp.ones((2, 8)), jnp.ones((4, 8))
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        fbgemm(x, w, activation="tanh")
    with pytest.raises(ValueError, match=r"bias \[4\]"):
        fbgemm(x, w, jnp.ones(8))


# Norms.


def test_layernorm_ends_in_int8():
    x, weight, bias = floats(4, 5, 96) + 2, floats(96, seed=1), floats(96, seed=2)
    got = quantized_layernorm(*map(jnp.asarray, (x, weight, bias)))
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    want = (x - mean) / np.sqrt(var + 1e-5) * weight + bias
    assert got[0].dtype == jnp.int8 and got[1].shape == (4, 5, 1)
    assert np.all(np.abs(dequantize((*got, None)) - want) <= np.asarray(got[1]) * 0.501)
    other = quantized_rmsnorm(jnp.asarray(x), jnp.asarray(weight))
    assert np.abs(dequantize((*other, None)) - want).max() > 1


def test_rmsnorm_ends_in_int8_and_feeds_qgemm():
    x, weight, w = floats(6, 64) + 2, floats(64, seed=1), floats(32, 64, seed=2)
    got = quantized_rmsnorm(jnp.asarray(x), jnp.asarray(weight))
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
    assert np.all(np.abs(dequantize((*got, None)) - want) <= np.asarray(got[1]) * 0.501)
    qw, scale, _ = quantize_per_channel(jnp.asarray(w))
    y = qgemm(got[0], qw, got[1], scale)
    assert np.abs(y - want @ w.T).max() < 0.03 * np.abs(want @ w.T).max()
