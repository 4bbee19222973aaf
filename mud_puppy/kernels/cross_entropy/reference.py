"""The definition, with the logits in memory; for tests, differentiated by JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.cross_entropy.stats import Shape, Stats


def stats(x: Any, head: Any, targets: Any, shape: Shape) -> Stats:
    """x [B, T, D], head [V, D] -> Stats of [B, T], in float32 or wider."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    raw = jnp.einsum("btd,vd->btv", x.astype(dtype), head.astype(dtype), precision="highest")
    logits = shape.logits(raw)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return Stats(logp, entropy, jax.nn.logsumexp(logits, axis=-1), logits.mean(-1))
