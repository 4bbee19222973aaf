"""Attention as its definition reads: the full mask, the full matrix, float32 or more. For tests.

Memory is quadratic in the sequence length; nothing here is tuned.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mud_puppy.kernels.attention.dropout import kept
from mud_puppy.kernels.attention.plan import LOWEST, Options


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    *,
    options: Options,
    sinks: Float[Array, " H"] | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    seed: Any = None,
    prefixes: tuple[Any, Any] | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """(softmax(scores) v in q's dtype, log-sum-exp of the visible scores and the sink)."""
    B, T, H, _ = q.shape
    S, groups = k.shape[1], H // k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(x.astype(dtype), groups, axis=2) for x in (k, v))
    seen = visible(T, S, options.causal, options.window)[None]
    if q_segments is not None and k_segments is not None:
        same = q_segments[:, :, None] == k_segments[:, None, :]
        if prefixes is not None:
            same |= prefixes[0][:, :, None] == prefixes[1][:, None, :]
        seen = seen & same
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k, precision="highest")
    scores = scores * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    seen = seen[:, None]
    if bias is not None:
        bias = bias.astype(dtype)
        scores, seen = scores + bias, seen & (bias >= LOWEST)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        sink = sinks.astype(dtype)[None, :, None, None]
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(top)  # it only keeps the powers small
    safe_top = jnp.where(top == -jnp.inf, 0, top)
    p = jnp.exp(scores - safe_top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - safe_top)
    if options.dropout:
        at = jnp.ogrid[:B, :H, :T, :S]
        p = jnp.where(kept(options.dropout, seed, *at), p / (1 - options.dropout), 0)
    p = p / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bhts,bshd->bthd", p, v, precision="highest")
    # The inner where keeps log's gradient finite in rows that see no key.
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + top)
    return out.astype(q.dtype), lse[..., 0].transpose(0, 2, 1)


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
