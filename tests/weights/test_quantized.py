"""A quantized base under an adapter: products, gradients, partition, merging, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mud_puppy.kernels import Quantized, dequantize, quantize
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.weights import Lora, combine, dense, is_weight, linear, merge_lora, partition


def adapter(base, rank=4, seed=0, **options):
    *stack, out, size = base.shape
    rng = np.random.default_rng(seed)
    a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((*stack, rank, size), (*stack, out, rank))
    )
    return Lora(base, a, b, jnp.full(stack, 0.5, jnp.float32), **options)


def codes(*shape, format="nf4", **options) -> Quantized:
    w = np.random.default_rng(1).normal(size=shape)
    return quantize(jnp.asarray(w, jnp.float32), format, **options)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_the_adapter_are_those_over_the_decoded_base(dora):
    q = codes(48, 128)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 128)), jnp.float32)
    magnitude = jnp.linspace(1, 2, 48) if dora else None

    def loss(base):
        def of(a, b, x):
            w = adapter(base, magnitude=magnitude)
            return (linear(x, Lora(base, a, b, w.scale, magnitude)) ** 2).sum()

        w = adapter(base)
        return jax.value_and_grad(of, argnums=(0, 1, 2))(w.a, w.b, x)

    got, want = loss(q), loss(dequantize(q, jnp.float32))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-3)


def test_it_is_one_leaf_and_frozen():
    params = {"layers": [[{"mlp": {"up": {"weight": adapter(codes(2, 32, 64))}}}]]}
    assert is_weight(codes(32, 64))
    train, frozen = partition(params)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(train)}
    assert kinds == {jnp.dtype("float32")} and len(jax.tree.leaves(train)) == 2
    back = combine(train, frozen)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert a is b


def test_merging_gives_a_plain_matrix():
    w = adapter(codes(32, 64, double=True))
    merged = merge_lora({"w": w})["w"]
    want = np.asarray(dequantize(w.base, jnp.float32)) + 0.5 * np.asarray(w.b @ w.a)
    np.testing.assert_allclose(merged, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dense(w.base), dequantize(w.base, jnp.float32))


@pytest.mark.parametrize("double", [False, True])
def test_leaves_are_split_as_the_dense_weight(double):
    """Placed on eight devices, the product is the same."""
    mesh = make_mesh("data=2,fsdp=4")
    q = codes(64, 512, double=double)
    places = shardings(mesh, {"w": ("mlp", "embed")}, {"w": adapter(q)})["w"]
    assert places.base.codes.spec == P(None, "fsdp") and places.base.scales.spec == P(None, "fsdp")
    rows = shardings(mesh, {"w": ("embed", "mlp")}, {"w": q})["w"]
    assert rows.codes.spec == P("fsdp", None) and rows.scales.spec == P("fsdp", None)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 512)), jnp.float32)
    want = linear(x, q)
    for place in (places.base, rows):
        with jax.set_mesh(mesh):
            got = jax.jit(linear)(x, jax.device_put(q, place))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
