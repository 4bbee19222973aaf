"""Which pairs are dropped: evenly, and without a pattern."""

import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels.attention import dropout


def test_dropout_is_even_and_without_pattern():
    at = jnp.ogrid[:2, :3, :64, :128]
    kept = np.asarray(dropout.kept(0.25, jnp.uint32(1), *at), np.float64)
    assert abs(kept.mean() - 0.75) < 5 * (0.1875 / kept.size) ** 0.5
    for axis in range(4):
        means = kept.mean(tuple(a for a in range(4) if a != axis))
        assert np.abs(means - 0.75).max() < 5 * (0.1875 / (kept.size / len(means))) ** 0.5
        a, b = np.take(kept, 0, axis), np.take(kept, 1, axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / a.size**0.5
    other = np.asarray(dropout.kept(0.25, jnp.uint32(2), *at))
    assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 5 / kept.size**0.5
