"""Products of integers: exact sums, what fake quantization trained, gradients, stacks, shards."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import dequantize, quantize
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.weights import FakeQuant, dense, finish_fake_quant, int8_dynamic, linear
from mud_puppy.weights.tree import at_repeat

OUT, IN, T = 24, 64, 10


def array(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


KINDS = {
    "int8 row": {"format": "int8"},
    "int8 tensor": {"format": "int8", "group": "tensor"},
    "int8 group": {"format": "int8", "group": 16},
    "int4 group": {"format": "int4", "group": 16},
    "int4 zeros": {"format": "int4", "group": 16, "zero_points": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_integers(kind: str) -> None:
    """Against int64 sums of numpy, from decoded weights and the definition of a token's scale."""
    x, q = array(0, T, IN), quantize(array(1, OUT, IN) + 0.3, **KINDS[kind])
    scales = np.repeat(np.asarray(q.scales, np.float64), q.group, axis=1)
    w = np.rint(np.asarray(dequantize(q, jnp.float32)) / scales).astype(np.int64)
    s = np.abs(np.asarray(x)).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(np.asarray(x) / s).astype(np.int64)
    groups = q.scales.shape[1]
    sums = np.einsum("tgk,ogk->tog", codes.reshape(T, groups, -1), w.reshape(OUT, groups, -1))
    want = (sums * np.asarray(q.scales, np.float64)).sum(-1) * s
    y = linear(x, int8_dynamic(q))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    # The mutation: inputs that were not rounded.
    assert np.abs(linear(x, q) - want).max() > 1e-3


@pytest.mark.parametrize(
    ("format", "group", "ranges"), [("int8", None, None), ("int4", 16, 2.0), ("int8", 16, 2.0)]
)
def test_it_computes_what_was_trained(format: str, group: int | None, ranges: float) -> None:
    learned = None if ranges is None else jnp.full((OUT, IN // (group or IN)), ranges)
    fake = FakeQuant(array(1, OUT, IN), learned, format, group, "int8")
    done = finish_fake_quant(fake)
    x = array(0, 2, T, IN)
    want = jax.jit(linear)(x, fake)
    np.testing.assert_allclose(jax.jit(linear)(x, done), want, rtol=1e-5, atol=1e-5)
    ours, theirs = (jax.grad(lambda x, w=w: (linear(x, w) ** 2).sum())(x) for w in (done, fake))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    plain = linear(x, replace(fake, activations="none"))
    assert np.abs(plain - want).max() > 1e-3


def test_a_row_of_zeros_and_half_precision() -> None:
    q = int8_dynamic(quantize(array(1, OUT, IN), "int8"))
    x = array(0, T, IN).at[3].set(0).astype(jnp.bfloat16)
    y = linear(x, q)
    assert y.dtype == jnp.bfloat16 and not y[3].any() and jnp.isfinite(y).all()
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ dense(q).T, atol=0.4)


def test_a_layer_of_a_stack_and_shards() -> None:
    stack = int8_dynamic(quantize(array(1, 3, OUT, IN), "int4", group=16))
    x = array(0, 8, IN)
    one = jax.tree.map(lambda leaf: leaf[1], stack)
    want = linear(x, one)
    picked = at_repeat([{"w": stack}], jnp.int32(1))[0]["w"]
    np.testing.assert_array_equal(linear(x, picked), want)
    mesh = make_mesh("data=2,fsdp=4")
    for axes in (("mlp", "embed"), ("embed", "mlp")):
        there = jax.device_put(one, shardings(mesh, {"w": axes}, {"w": one})["w"])
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(jax.jit(linear)(x, there), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "mxfp4", "fp8"])
def test_codes_that_are_no_integers_are_refused(format: str) -> None:
    with pytest.raises(ValueError, match="no integers times a scale"):
        int8_dynamic(quantize(array(0, OUT, IN), format))
