"""The definition of `decode_attention`, with all scores in memory, in float32 or wider."""

from typing import Any

import jax.numpy as jnp


def attention(
    q: Any, k: Any, v: Any, positions: Any, *, window: int | None, scale: float,
    softcap: float | None, sinks: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(out [B, T, H, D] in q's dtype, log-sum-exp [B, T, H]); a row that sees nothing gives 0."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    B, T, H, D = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, D).astype(dtype)
    x = jnp.einsum("btkgd,bskd->btkgs", grouped, k.astype(dtype), precision="highest") * scale
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    slot, at = jnp.arange(k.shape[1])[None, None], positions[..., None]
    seen = (slot <= at) & (slot > (-1 if window is None else at - window))
    x = jnp.where(seen[:, :, None, None], x, -jnp.inf).reshape(B, T, H, -1)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(dtype)[:, None], (B, T, H, 1))
        x = jnp.concatenate([x, sink], axis=-1)
    top = jnp.maximum(x.max(-1, keepdims=True), jnp.finfo(dtype).min)
    e = jnp.exp(x - top)
    total = e.sum(-1, keepdims=True)
    whole = jnp.where(total == 0, 1, total)
    p = (e / whole)[..., : k.shape[1]].reshape(*grouped.shape[:4], -1)
    out = jnp.einsum("btkgs,bskd->btkgd", p, v.astype(dtype), precision="highest")
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(whole))
    return out.reshape(B, T, H, -1).astype(q.dtype), lse[..., 0]
