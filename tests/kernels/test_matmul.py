"""matmul: contract with arrays, dispatch to registered leaves."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import matmul, token_logps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Doubled:
    """A leaf that stands for twice its array."""

    w: Any


@matmul.register(Doubled)
def _(w: Doubled, x: Any) -> Any:
    return 2 * matmul(x, w.w)


def arrays(*shapes, dtype=jnp.float32):
    r = np.random.default_rng(0)
    return [jnp.asarray(r.normal(size=s), dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_equals_float64_to_one_rounding(dtype):
    x, w = arrays((2, 5, 64), (7, 64), dtype=dtype)
    y = matmul(x, w)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert y.dtype == dtype and y.shape == (2, 5, 7)
    error = np.abs(np.asarray(y, np.float64) - exact).max() / np.abs(exact).max()
    assert error < 8 * jnp.finfo(jnp.float32).eps * 8 + jnp.finfo(dtype).eps
    wrong = np.asarray(x, np.float64) @ np.asarray(w, np.float64)[::-1].T
    assert np.abs(np.asarray(y, np.float64) - wrong).max() / np.abs(exact).max() > 0.1


def test_half_precision_sums_in_float32():
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert matmul(ones, ones)[0, 0] == 4096  # a bfloat16 sum of ones stops at 256
    total = jnp.bfloat16(0)
    for one in np.ones(512):
        total = total + jnp.bfloat16(one)
    assert total == 256


def test_weight_is_cast_and_its_gradient_keeps_its_dtype():
    x, w = arrays((3, 8), (4, 8))
    y, pull = jax.vjp(matmul, x.astype(jnp.bfloat16), w)
    dx, dw = pull(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_leaves_are_dispatched_under_jit_and_inside_token_logps():
    x, w = arrays((2, 5, 8), (6, 8))
    y = jax.jit(matmul)(x, Doubled(w))
    np.testing.assert_allclose(y, matmul(x, 2 * w), rtol=1e-6)
    targets = jnp.zeros((2, 5), jnp.int32)
    of_leaf, of_array = token_logps(x, Doubled(w), targets), token_logps(x, 2 * w, targets)
    np.testing.assert_allclose(of_leaf[0], of_array[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_leaf[1], of_array[1], rtol=1e-5, atol=1e-5)
    assert jnp.abs(of_leaf[0] - token_logps(x, w, targets)[0]).max() > 0.1


def test_refuses_what_it_does_not_know():
    x, w = arrays((3, 8), (4, 8))
    with pytest.raises(TypeError, match="no rule for a weight of type dict"):
        matmul(x, {"w": w})
    with pytest.raises(ValueError, match=r"expected a weight \[out, 8\], got \(8, 4\)"):
        matmul(x, w.T)
    with pytest.raises(TypeError, match="expected a float weight, got int8"):
        matmul(x, w.astype(jnp.int8))
