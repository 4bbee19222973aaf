"""Numbers that are none: a NaN stays one, and what is masked has no part in any gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import FORMATS, dequantize
from tests.kernels.calls import CACHE, K, Q, V, attend, decode, floats


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_no_format_makes_a_number_of_what_is_none(format, bad):
    w = floats(4, 64)
    got = dequantize(quantize(w.at[1, 3].set(bad), format))
    assert not np.isfinite(got[1, 3])
    np.testing.assert_array_equal(got[2], dequantize(quantize(w, format))[2])


@pytest.mark.parametrize("low", [-2e30, -np.inf])
@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_a_bias_that_hides_a_row(implementation, low):
    """As masks are written: the row gives 0 and has no part in any gradient."""
    bias = floats(1, 4, 16, 16).at[:, 1, 9].set(low).at[..., 3].set(low)

    def f(q, k, v, bias):
        return attend(q, k, v, bias=bias, implementation=implementation, return_lse=True)()

    (out, lse), pull = jax.vjp(f, Q, K, V, bias)
    assert not np.asarray(out[:, 9, 1]).any() and np.isneginf(lse[:, 9, 1]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[:, 8]).all()
    grads = pull((jnp.zeros_like(out).at[:, 9, 1].set(1.0), jnp.zeros_like(lse)))
    assert all(not np.asarray(g).any() for g in grads)
    grads = pull((jnp.ones_like(out), jnp.where(jnp.isfinite(lse), 1.0, 0.0)))
    assert all(np.isfinite(g).all() and np.asarray(g).any() for g in grads)
    assert not np.asarray(grads[1][:, 3]).any() and np.asarray(grads[1][:, 4]).any()


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_a_sink_that_counts_for_nothing(implementation):
    ids = {"segment_ids": jnp.ones((2, 16), int), "kv_segment_ids": jnp.full((2, 16), 2)}
    options = {"implementation": implementation, "return_lse": True}

    def f(q, sinks):
        out, lse = attend(q, K, V, sinks=sinks, **ids, **options)()
        return out.sum(), lse

    (value, lse), pull = jax.vjp(f, Q, jnp.full(4, -jnp.inf))
    grads = pull((jnp.ones(()), jnp.zeros_like(lse)))
    assert value == 0 and np.isneginf(lse).all()
    assert all(np.isfinite(g).all() for g in grads)
    out = attend(sinks=jnp.full(4, -jnp.inf), implementation=implementation)()
    np.testing.assert_allclose(out, attend(implementation="reference")(), atol=1e-5)


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_hidden_slots_and_rows_that_are_off_leave_gradients_alone(implementation):
    """A slot past the position may hold anything finite: its power would be infinite."""
    q, k, v = CACHE
    at = jnp.array([[2, 3, 4, 5], [-1, -1, 7, 8]])

    def grads(k, v):
        def loss(q, k, v):
            options = {"at": at, "implementation": implementation, "return_lse": True}
            out, lse = decode(q, k, v, **options)()
            return (out * jnp.cos(out)).sum() + jnp.where(at[..., None] < 0, 0, lse).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    want = grads(k, v)
    for g, w in zip(grads(k.at[:, 9:].mul(1e3), v.at[:, 9:].mul(1e3)), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
    assert not np.asarray(want[0][1, :2]).any() and np.asarray(want[0][1, 2]).any()
    assert np.abs(np.asarray(grads(k.at[:, 2].mul(2), v)[0]) - want[0]).max() > 1e-3
