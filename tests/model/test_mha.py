"""FlashMHA against attention written out with its own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mud_puppy as mp

B, T, E = 2, 12, 24


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, E)), jnp.float32)


def by_hand(layer, x, causal=True, window=None):
    H, K, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    y = x @ layer.qkv.kernel[...] + (0 if layer.qkv.bias is None else layer.qkv.bias[...])
    q, k, v = jnp.split(y.reshape(B, T, H + 2 * K, D), (H, H + K), axis=2)
    k, v = (jnp.repeat(a, H // K, axis=2) for a in (k, v))
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None]
    seen = (j <= i) if causal else jnp.ones((T, T), bool)
    if window is not None:
        seen &= j > i - window
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", p, v).reshape(B, T, H * D)
    return out @ layer.out.kernel[...] + (0 if layer.out.bias is None else layer.out.bias[...])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"num_kv_heads": 1, "use_bias": False}, {"causal": False}),
        ({"num_kv_heads": 2, "head_dim": 8}, {"window": 3}),
    ],
)
def test_equals_attention_by_hand(sizes, options):
    layer = mp.FlashMHA(E, 4, **sizes, **options, rngs=nnx.Rngs(1))
    if layer.qkv.bias is not None:
        layer.qkv.bias[...] = jnp.linspace(-1, 1, layer.qkv.bias.shape[0])
    x = tokens()
    np.testing.assert_allclose(layer(x), by_hand(layer, x, **options), atol=2e-6)
    wrong = by_hand(layer, x, **{"causal": True, "window": 5 if "window" in options else 2})
    assert jnp.abs(layer(x) - wrong).max() > 1e-2


def test_segments_do_not_see_each_other():
    layer, x = mp.FlashMHA(E, 2, rngs=nnx.Rngs(0)), tokens()
    ids = jnp.broadcast_to(jnp.arange(T) // 6, (B, T))
    changed = x.at[:, :6].add(1.0)
    before, after = layer(x, segment_ids=ids), layer(changed, segment_ids=ids)
    np.testing.assert_array_equal(before[:, 6:], after[:, 6:])
    assert jnp.abs(layer(x) - layer(changed))[:, 6:].max() > 1e-3


def test_dropout_draws_anew_each_call_unless_deterministic():
    layer, x = mp.FlashMHA(E, 2, dropout=0.5, rngs=nnx.Rngs(0, dropout=1)), tokens()
    first, second = layer(x), layer(x)
    assert jnp.abs(first - second).max() > 1e-2
    again = mp.FlashMHA(E, 2, dropout=0.5, rngs=nnx.Rngs(0, dropout=1))
    np.testing.assert_array_equal(again(x), first)
    layer.deterministic = True
    np.testing.assert_array_equal(layer(x), layer(x))
    np.testing.assert_allclose(layer(x), by_hand(layer, x), atol=2e-6)


def test_trains_under_jit_in_bfloat16():
    layer = mp.FlashMHA(E, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def loss(params):
        y = nnx.merge(graph, params)(tokens())
        assert y.dtype == jnp.bfloat16
        return (y.astype(jnp.float32) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads["out"]))
    step = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert loss(step) < loss(params)


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="embed_dim 24 is no multiple of num_heads 5"):
        mp.FlashMHA(E, 5)
    with pytest.raises(ValueError, match="num_kv_heads 3 does not divide num_heads 4"):
        mp.FlashMHA(E, 4, num_kv_heads=3)
