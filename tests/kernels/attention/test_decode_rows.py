"""decode_attention against rows of flash_attention, and against a sum by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import decode_attention, flash_attention
from tests.kernels.attention.calls import qkv
from tests.kernels.contract import tolerance


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_decode_equals_the_rows_of_flash_attention(T, window):
    q, k, v = qkv()
    want = flash_attention(q, k, v, window=window)[:, 40 - T :]
    rest = jnp.full((2, 9, 2, 8), 1e3)  # slots past every position
    cache = [jnp.concatenate([x, rest], axis=1) for x in (k, v)]
    positions = jnp.broadcast_to(jnp.arange(40 - T, 40), (2, T))
    got = jax.jit(lambda *args: decode_attention(*args, window=window))(
        q[:, 40 - T :], *cache, positions
    )
    np.testing.assert_allclose(got, want, atol=tolerance(jnp.float32, 49) * 4)
    one_less = decode_attention(q[:, 40 - T :], *cache, positions - 1, window=window)
    assert jnp.abs(one_less - want).max() > 0.01


def test_decode_rows_have_their_own_positions():
    q, k, v = qkv(H=1, K=1)
    positions = jnp.array([[3, 30], [17, 2]])
    got = np.asarray(decode_attention(q[:, :2], k, v, positions))
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in (q, k, v))
    for b, t in np.ndindex(2, 2):
        n = int(positions[b, t]) + 1
        p = np.exp(k[b, :n] @ q[b, t] * 8**-0.5)
        np.testing.assert_allclose(got[b, t, 0], p @ v[b, :n] / p.sum(), atol=1e-6)
