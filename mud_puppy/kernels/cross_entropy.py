"""Log-probabilities of target tokens and the entropy of each prediction, without [B, T, V] logits.

Chunks of T (never of B, which may be sharded) make their logits, reduce them and drop them. For a
plain head the backward is written out, after Cut Your Losses (arXiv:2411.09009) and Liger-Kernel
(arXiv:2410.10989): where the head is frozen, as in LoRA, d logp / d hidden = head[target] - p @
head is computed by the forward pass while it has the logits, so they are made once, not twice;
where it trains, the backward makes them again and sums d head in float32. Any other weight goes
through `matmul` under `jax.checkpoint`, and its logits have the rounding of hidden's dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from mud_puppy.kernels.matmul import contract_last, matmul

CHUNK_BYTES = 256 * 2**20  # of one chunk's float32 logits on one device
MIN_CHUNK = 16


def token_logps(
    hidden: Float[Array, "B T D"], head: Any, targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log p(target), entropy of p in nats), float32 [B, T], for p = softmax(hidden @ head.T).

    `head` is a weight [V, D]; targets are in [0, V). Both results are differentiable in hidden and
    in head, and nothing is computed for the one that is not differentiated.
    """
    B, T, D = hidden.shape
    if targets.shape != (B, T):
        raise ValueError(f"expected targets {(B, T)}, got {targets.shape}")
    if isinstance(head, jax.Array) or hasattr(head, "__array__"):
        if head.shape[1:] != (D,):
            raise ValueError(f"expected a head [V, {D}], got {head.shape}")
        x, y = _chunks(hidden, len(head)), _chunks(targets, len(head))
        logps, entropy = _dense(x, jnp.asarray(head), y)
    else:
        vocab = jax.eval_shape(lambda: matmul(hidden[0, :1], head)).shape[-1]
        x, y = _chunks(hidden, vocab), _chunks(targets, vocab)
        logps, entropy = _each(jax.checkpoint(partial(_through_matmul, head)), x, y)
    return _whole(logps, T), _whole(entropy, T)


def _through_matmul(head: Any, x: Any, y: Any) -> Any:
    return _reduce(matmul(x, head).astype(jnp.float32), y)[:2]


# A plain head. x is [n, B, C, D], y and the results are [n, B, C]: n chunks of C tokens.


@jax.custom_vjp
def _dense(x: Any, head: Any, y: Any) -> Any:
    return _each(lambda x, y: _reduce(_logits(x, head), y)[:2], x, y)


def _dense_forward(x: Any, head: Any, y: Any) -> Any:
    args = x.value, head.value, y.value
    if head.perturbed:
        return _dense(*args), (*args, None)

    def chunk(x: Any, y: Any) -> Any:
        logp, entropy, _, p = _reduce(_logits(x, args[1]), y)
        slope = (_one_hot(y, p) - p).astype(x.dtype)
        return logp, entropy, slope @ args[1].astype(x.dtype)

    logps, entropy, slopes = _each(chunk, args[0], args[2])
    return (logps, entropy), (*args, slopes)


def _dense_backward(residuals: Any, cotangents: Any) -> Any:
    x, head, y, slopes = residuals
    g_logp, g_entropy = cotangents
    if slopes is not None and isinstance(g_entropy, SymbolicZero):
        return (g_logp[..., None] * slopes).astype(x.dtype), None, None
    g_logp, g_entropy = (
        jnp.zeros(y.shape, jnp.float32) if isinstance(g, SymbolicZero) else g for g in cotangents
    )

    def step(d_head: Any, chunk: Any) -> Any:
        x, y, g, h = chunk
        _, entropy, log_p, p = _reduce(_logits(x, head), y)
        # d entropy / d logits = -p (log p + entropy)
        d = g[..., None] * (_one_hot(y, p) - p) - h[..., None] * p * (log_p + entropy[..., None])
        d = d.astype(x.dtype)
        rows = jax.lax.dot_general(
            d, x, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32
        )
        return d_head + rows, d @ head.astype(x.dtype)

    d_head, dx = jax.lax.scan(step, jnp.zeros(head.shape, jnp.float32), (x, y, g_logp, g_entropy))
    # With a frozen head, d_head is dead code and XLA drops it.
    return dx, None if slopes is not None else d_head.astype(head.dtype), None


_dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


def _logits(x: Any, head: Any) -> Any:
    """float32: rounding logits to bfloat16 would put an error of 2^-8 of their size into log p."""
    return contract_last(x, head.astype(x.dtype), jnp.float32)


def _reduce(logits: Any, y: Any) -> Any:
    """(log p(y), entropy, log p, p); what is not used costs nothing.

    One pass over the logits for their maximum, one for the three sums.
    """
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shifted = logits - top
    e = jnp.exp(shifted)
    total = e.sum(-1)
    log_total = jnp.log(total)
    logp = jnp.where(_one_hot(y, logits), shifted, 0).sum(-1) - log_total
    entropy = log_total - (e * shifted).sum(-1) / total
    return logp, entropy, shifted - log_total[..., None], e / total[..., None]


def _one_hot(y: Any, like: Any) -> Any:
    return jax.lax.broadcasted_iota(y.dtype, like.shape, like.ndim - 1) == y[..., None]


# Chunks of T.


def _chunks(x: Any, vocab: int) -> Any:
    """[B, T, ...] -> [n, B, C, ...], zeros after T; n C exceeds T by less than n."""
    B, T = x.shape[:2]
    most = max(MIN_CHUNK, CHUNK_BYTES // (4 * (B // _shards(B)) * vocab))
    n = -(-T // most)
    size = -(-T // n)
    x = jnp.pad(x, [(0, 0), (0, n * size - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, n, size, *x.shape[2:]), 1, 0)


def _shards(B: int) -> int:
    """Devices of the ambient mesh (`jax.set_mesh`), which share the batch when they divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or B % mesh.size else mesh.size


def _whole(x: Any, T: int) -> Any:
    """[n, B, C] -> [B, T]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :T]


def _each(f: Any, *xs: Any) -> Any:
    return jax.lax.scan(lambda _, chunk: (None, f(*chunk)), None, xs)[1]
