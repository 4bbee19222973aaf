"""Attention of new tokens to a cache whose slot s holds the token at position s.

Plain matrices: a step of generation reads the whole cache once and is bound by that. The queries of
a long prompt go in chunks, so that the scores stay [B, H, CHUNK, S].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 128


def decode_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H D"]:
    """out [B, T, H, D] in q's dtype; slot j is seen iff positions - window < j <= positions.

    K divides H. Slots past a row's position may hold anything finite; a position of -1 switches a
    row off (its result is finite and means nothing). `scale` is D ** -0.5 when None.
    """
    T, n = q.shape[1], -(-q.shape[1] // CHUNK)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if n == 1:
        return _attend(q, k, v, positions, window, factor)
    chunks = [_chunks(x, n) for x in (q, positions)]
    out = jax.lax.map(lambda c: _attend(c[0], k, v, c[1], window, factor), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :T]


def _attend(q: Any, k: Any, v: Any, positions: Any, window: int | None, scale: float) -> Any:
    f32 = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k.astype(q.dtype), preferred_element_type=f32)
    slot, at = jnp.arange(k.shape[1]), positions[..., None]
    seen = slot <= at
    if window is not None:
        seen &= slot > at - window
    # Not -inf: a row that is switched off by position -1 must stay finite.
    scores = jnp.where(seen[:, None, None], scores * scale, jnp.finfo(f32).min)
    p = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", p, v.astype(q.dtype), preferred_element_type=f32)
    return out.astype(q.dtype).reshape(q.shape)


def _chunks(x: Any, n: int) -> Any:
    """[B, T, ...] -> [n, B, CHUNK, ...], zeros after T."""
    padded = jnp.pad(x, [(0, 0), (0, n * CHUNK - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(x.shape[0], n, CHUNK, *x.shape[2:]), 1, 0)
