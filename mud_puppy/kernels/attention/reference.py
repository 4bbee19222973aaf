"""Attention as its definition reads: the full mask, the full matrix, float32 or more. For tests.

Memory is quadratic in the sequence length; nothing here is tuned.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """(softmax(scale q k^T) v in q's dtype, log-sum-exp of the visible scores)."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(x.astype(dtype), groups, axis=2) for x in (k, v))
    seen = visible(T, S, causal, window)[None]
    if q_segments is not None and k_segments is not None:
        seen = seen & (q_segments[:, :, None] == k_segments[:, None, :])
    scores = jnp.einsum("bthd,bshd->btsh", q.astype(dtype), k, precision="highest") * scale
    scores = jnp.where(seen[..., None], scores, -jnp.inf)
    top = jnp.max(scores, axis=2, keepdims=True)
    p = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = p.sum(axis=2)
    out = jnp.einsum("btsh,bshd->bthd", p, v, precision="highest")
    out = out / jnp.where(total == 0, 1, total)[..., None]
    # The inner where keeps log's gradient finite in rows that see no key.
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + top[:, :, 0])
    return out.astype(q.dtype), lse


def visible(T: int, S: int, causal: bool, window: int | None) -> Bool[Any, "T S"]:
    """Query i sees key j: causal j <= i, window i - window < j; the last i is the last j."""
    i = jnp.arange(T)[:, None] + S - T
    j = jnp.arange(S)[None, :]
    seen = jnp.ones((T, S), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= j > i - window
    return seen
