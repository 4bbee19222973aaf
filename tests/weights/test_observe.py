"""Moments of a weight's inputs, gathered by a product that does not know of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import quantize
from mud_puppy.weights import linear, linears
from mud_puppy.weights.observe import Moments, Observed, no_moments

rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(24, 64)), jnp.float32)
X = jnp.asarray(rng.normal(size=(3, 10, 64)), jnp.float32)


@partial(jax.jit, static_argnums=0)
def observe(run, x, w, moments, mask=None):
    refs = jax.tree.map(jax.new_ref, moments)
    y = run(x, Observed(w, refs, mask))
    return y, jax.tree.map(jax.freeze, refs)


def want(x) -> Moments:
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return Moments(2 * x.T @ x, np.abs(x).sum(0), len(x))


def assert_equal(got: Moments, want: Moments, rtol=1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("weight", [W, quantize(W, "int4")], ids=["array", "quantized"])
def test_sums_of_all_calls_and_the_same_product(weight):
    y, moments = observe(linear, X, weight, no_moments(64))
    np.testing.assert_array_equal(y, jax.jit(linear)(X, weight))
    assert_equal(moments, want(X))
    _, moments = observe(linear, 2 * X, weight, moments)
    assert_equal(moments, want(np.concatenate([X, 2 * X])))


def test_padding_does_not_count_whatever_it_holds():
    mask = jnp.asarray(rng.random((3, 10)) < 0.6)
    dirty = jnp.where(mask[..., None], X, jnp.nan)
    _, moments = observe(linear, dirty, W, no_moments(64), mask)
    assert_equal(moments, want(X[mask]))
    _, wrong = observe(linear, X, W, no_moments(64))  # the mask is what does it
    assert float(wrong.count) == 30 > float(moments.count)


def test_sums_of_bfloat16_are_float32():
    x = jnp.asarray(rng.normal(size=(4000, 64)), jnp.bfloat16)
    _, moments = observe(linear, x, W, no_moments(64))
    assert_equal(moments, want(x.astype(jnp.float32)), rtol=1e-4)


def test_beside_others_in_a_checkpointed_scan():
    def run(x, w):
        def body(x, _):
            y, z = linears(x, [w, W])
            return x + 0 * (y + z).sum(), None

        return jax.lax.scan(jax.checkpoint(body), x, None, length=3)[0]

    _, moments = observe(run, X, W, no_moments(64))
    assert_equal(moments, want(np.concatenate([X] * 3)))


def test_what_comes_after_is_not_computed():
    def run(x, w):
        return linear(linear(x, w), jnp.ones((4096, 24)))

    def only_moments(x, w, moments):
        return observe(run, x, w, moments)[1]

    compiled = jax.jit(only_moments).lower(X, W, no_moments(64)).compile()
    whole = jax.jit(partial(observe, run)).lower(X, W, no_moments(64)).compile()
    assert compiled.cost_analysis()["flops"] < 0.2 * whole.cost_analysis()["flops"]
