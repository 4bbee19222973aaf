"""AWQ's choice of scales: the candidates, and the error that each would leave."""

import jax.numpy as jnp
import numpy as np

from mud_puppy.weights import awq
from mud_puppy.weights.gptq import round_to_nearest

OPTIONS = {"bits": 4, "group": 32, "symmetric": False}
rng = np.random.default_rng(0)
SIZES = np.exp(1.5 * rng.normal(size=128))  # a few inputs are much larger than the others
X = rng.normal(size=(512, 128)) * SIZES
W = jnp.asarray(rng.normal(size=(32, 128)) * 0.05, jnp.float32)
H = jnp.asarray(2 * X.T @ X, jnp.float32)


def test_candidates_are_powers_of_the_mean():
    magnitude = jnp.asarray(np.abs(X).mean(0), jnp.float32)
    s = np.asarray(awq.candidates(7 * magnitude), np.float64)  # at any scale
    assert s.shape == (11, 128)
    np.testing.assert_allclose(s[0], 1, rtol=1e-6)
    for alpha, row in zip(awq.ALPHAS, s, strict=True):
        want = np.abs(X).mean(0) ** alpha
        np.testing.assert_allclose(row / row[0], want / want[0], rtol=1e-4)
        np.testing.assert_allclose(row.max() * row.min(), 1, rtol=1e-4)


def test_inputs_that_were_never_seen_have_finite_scales():
    for magnitude in (jnp.zeros(8), jnp.ones(8).at[3].set(0)):
        s = awq.candidates(magnitude)
        assert np.isfinite(s).all() and (np.asarray(s) > 0).all()


def test_errors_are_those_of_the_outputs():
    scales = awq.candidates(jnp.asarray(np.abs(X).mean(0), jnp.float32))
    got = awq.errors(W, H, scales, **OPTIONS)
    for error, s in zip(got, np.asarray(scales), strict=True):
        codes, steps, zeros = (
            np.asarray(x, np.float64) for x in round_to_nearest(W * s, **OPTIONS)
        )
        wide = (np.repeat(x, 32, 1) for x in (zeros, steps))
        decoded = (codes - next(wide)) * next(wide)
        outputs = X / s @ decoded.T - X @ np.asarray(W, np.float64).T
        np.testing.assert_allclose(error, 2 * (outputs**2).sum(), rtol=1e-3)
    # Not scaling is among them, and not the best when inputs are so unlike.
    assert float(got.min()) < 0.8 * float(got[0])
