"""`decode_attention` in plain XLA: matrices, for a step reads the whole cache and is bound by that.

The queries of a long prompt go in chunks, so that the scores stay [B, H, CHUNK, S].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.matmul import exact

CHUNK = 128


def attention(
    q: Any, k: Any, v: Any, positions: Any, *, window: int | None, scale: float,
    softcap: float | None, sinks: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(out [B, T, H, D] in q's dtype, float32 log-sum-exp [B, T, H])."""
    T, n = q.shape[1], -(-q.shape[1] // CHUNK)

    def attend(q: Any, positions: Any) -> Any:
        return _attend(q, k, v, positions, window, scale, softcap, sinks)

    if n == 1:
        return attend(q, positions)
    out = jax.lax.map(lambda c: attend(*c), tuple(_chunks(x, n) for x in (q, positions)))
    return jax.tree.map(lambda x: _whole(x, T), out)


def _attend(
    q: Any, k: Any, v: Any, positions: Any, window: Any, scale: float, softcap: Any, sinks: Any
) -> Any:
    f32 = jnp.promote_types(q.dtype, jnp.float32)
    B, T, H, D = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, D)
    dot = partial(jnp.einsum, precision=exact(q.dtype), preferred_element_type=f32)
    x = dot("btkgd,bskd->bkgts", grouped, k.astype(q.dtype)) * scale
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    slot, at = jnp.arange(k.shape[1])[None, None], positions[..., None]
    seen = slot <= at
    if window is not None:
        seen &= slot > at - window
    seen = seen[:, None, None]
    # Not -inf: a row that is switched off by position -1 must stay finite. Hidden before exp, for
    # an infinite power's gradient would be NaN however it is hidden after.
    x = jnp.where(seen, x, jnp.finfo(f32).min)
    top = x.max(-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(f32).reshape(1, k.shape[2], -1, 1, 1)
        top = jnp.maximum(top, sink)
    e = jnp.where(seen, jnp.exp(x - top), 0)
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - top)
    whole = jnp.where(total == 0, 1, total)
    p = (e / whole).astype(q.dtype)
    out = dot("bkgts,bskd->btkgd", p, v.astype(q.dtype))
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(whole))[..., 0]  # [B, K, G, T]
    return out.astype(q.dtype).reshape(B, T, H, -1), jnp.moveaxis(lse, 3, 1).reshape(B, T, H)


def _chunks(x: Any, n: int) -> Any:
    """[B, T, ...] -> [n, B, CHUNK, ...], zeros after T."""
    padded = jnp.pad(x, [(0, 0), (0, n * CHUNK - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(x.shape[0], n, CHUNK, *x.shape[2:]), 1, 0)


def _whole(x: Any, T: int) -> Any:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]
