"""Attention in plain XLA, memory linear in sequence length forward and backward.

FlashAttention's online softmax (arXiv:2205.14135) and recomputing backward (arXiv:2307.08691) as
one `lax.scan` over (query block, key block) pairs. Which pairs can see each other at all is known
while tracing, so blocks wholly above the causal diagonal or left of the window cost nothing;
segments are masked inside a block, not skipped. Query heads that share a key head are grouped, K
and V are never repeated, and B stays an axis of its own, so the batch may be sharded. Sinks are
merged by the log-sum-exp, as any part of a sequence could be.
"""

import operator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mud_puppy.kernels.attention.dropout import kept
from mud_puppy.kernels.attention.plan import LOWEST, Options
from mud_puppy.kernels.matmul import exact
from mud_puppy.kernels.varying import alike

# Queries and keys a block at most: on 2 CPU cores 128 is 1.3x as fast as 256, 1.8x as 512 (float32,
# T 1024, 9 heads of 64, forward and backward); an accelerator wants fewer, larger steps.
CPU_BLOCK, BLOCK = 128, 512


@dataclass(frozen=True)
class _Plan:
    """What is static of one call. T and S are the lengths before padding to whole blocks."""

    T: int
    S: int
    q_block: int
    k_block: int
    options: Options

    def pairs(self) -> np.ndarray:
        """int32 [P, 2]: the block pairs in which some query may see some key."""
        shift = self.S - self.T
        pairs = []
        for i in range(-(-self.T // self.q_block)):
            first, last = i * self.q_block + shift, (i + 1) * self.q_block - 1 + shift
            for j in range(-(-self.S // self.k_block)):
                above = self.options.causal and j * self.k_block > last
                window = self.options.window
                left = window and (j + 1) * self.k_block - 1 <= first - window
                if not (above or left):
                    pairs.append((i, j))
        return np.array(pairs, np.int32).reshape(-1, 2)


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
    max_block: int | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """(out in q's dtype, float32 log-sum-exp); a query that sees no key gives 0 and -inf."""
    T, S, K = q.shape[1], k.shape[1], k.shape[2]
    max_block = max_block or (CPU_BLOCK if jax.default_backend() == "cpu" else BLOCK)
    plan = _Plan(T, S, _block(T, max_block), _block(S, max_block), options)
    q = q.reshape(*q.shape[:2], K, q.shape[2] // K, -1).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    q, qs = _pad(q, plan.q_block, 3), _pad(q_segments, plan.q_block, 1)
    k, v = _pad(k, plan.k_block, 2), _pad(v, plan.k_block, 2)
    if bias is not None:
        heads = (K, -1) if bias.shape[1] > 1 else (1, 1)
        bias = bias.reshape(bias.shape[0], *heads, T, S)
        bias = _pad(_pad(bias, plan.q_block, 3), plan.k_block, 4)
    readers, read = prefixes or (None, None)
    ids = (
        (qs, _pad(k_segments, plan.k_block, 1)),
        tuple(_pad(x, block, 1) for x, block in ((readers, plan.q_block), (read, plan.k_block))),
    )
    extra = ids, seed
    result: Any = _attention(plan, *alike((q, k, v, bias, extra)))
    out, lse = result
    out = out[:, :, :, :T].transpose(0, 3, 1, 2, 4)
    lse = lse[:, :, :, :T].transpose(0, 3, 1, 2)
    out, lse = out.reshape(*out.shape[:2], -1, out.shape[-1]), lse.reshape(*lse.shape[:2], -1)
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks)


def _with_sinks(out: Any, lse: Any, sinks: Any) -> tuple[Any, Any]:
    sinks = sinks.astype(lse.dtype)[None, None]
    # A sink may be -inf too: it counts for nothing.
    empty = lse == -jnp.inf
    seen = jnp.where(empty, 0, lse)
    share = jnp.where(empty, 0, jax.nn.sigmoid(seen - sinks))[..., None]
    return (out * share).astype(out.dtype), jnp.where(empty, sinks, jnp.logaddexp(seen, sinks))


# Below, q is [B, K, G, T, D], out [B, K, G, T, Dv], k [B, K, S, D], v [B, K, S, Dv], lse [B, K, G,
# T], bias [B|1, K|1, G|1, T, S] or None, and extra the ids of segments and of prefixes, [B, T] and
# [B, S] each or None, and the seed; T and S are whole blocks.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Any, k: Any, v: Any, bias: Any, extra: tuple) -> Any:
    return _forward(plan, q, k, v, bias, extra)[0]


def _forward(plan: _Plan, q: Any, k: Any, v: Any, bias: Any, extra: tuple) -> Any:
    f32 = jnp.promote_types(q.dtype, jnp.float32)

    def step(state: Any, pair: Any) -> Any:
        out, top, total = (_take(x, pair[0], plan.q_block, 3) for x in state)
        vj = _take(v, pair[1], plan.k_block, 2)
        scores = _scores(plan, pair, q, k, bias, extra)[1]
        new_top = jnp.maximum(top, scores.max(-1))
        safe_top = jnp.where(new_top == -jnp.inf, 0, new_top)
        p = jnp.exp(scores - safe_top[..., None])
        keep = jnp.exp(top - safe_top)
        pv = _dot("bkgts,bksd->bkgtd", _dropped(plan, pair, p, extra).astype(q.dtype), vj)
        new = (out * keep[..., None] + pv, new_top, total * keep + p.sum(-1))
        put = partial(_put, i=pair[0], block=plan.q_block, axis=3)
        return tuple(map(put, state, new)), None

    rows = q.shape[:4]
    zero = jnp.zeros_like(q[..., 0], f32)
    state = jnp.broadcast_to(zero[..., None], (*rows, v.shape[-1])), zero - jnp.inf, zero
    out, top, total = _each(step, state, plan.pairs())
    out = (out / jnp.where(total == 0, 1, total)[..., None]).astype(q.dtype)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    # Named here, where they are residuals: naming only the output outside of the custom_vjp would
    # make a remat policy that saves "attention" run this forward again.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q, k, v, bias, extra, out, lse)


def _backward(plan: _Plan, residuals: Any, cotangents: Any) -> Any:
    q, k, v, bias, extra, out, lse = residuals
    d_out, d_lse = cotangents
    f32 = lse.dtype
    # d scores = p * (d p - sum(d out * out) + d lse), and p = exp(scores - lse).
    row = jnp.where(lse == -jnp.inf, 0, d_lse) - (d_out.astype(f32) * out.astype(f32)).sum(-1)
    safe_lse = jnp.where(lse == -jnp.inf, 0, lse)

    def step(state: Any, pair: Any) -> Any:
        dq, dk, dv, d_bias = state
        vj = _take(v, pair[1], plan.k_block, 2)
        kj, scores, slope = _scores(plan, pair, q, k, bias, extra)
        qi, gi, ri, li = (_take(x, pair[0], plan.q_block, 3) for x in (q, d_out, row, safe_lse))
        p = jnp.exp(scores - li[..., None])
        dp = _dropped(plan, pair, _dot("bkgtd,bksd->bkgts", gi, vj), extra)
        ds = p * (dp + ri[..., None])
        if d_bias is not None:
            axes = tuple(axis for axis in range(3) if d_bias.shape[axis] == 1)
            d_bias = _put_pair(plan, d_bias, ds.sum(axes, keepdims=True), pair)
        ds = (ds * slope * plan.options.scale).astype(q.dtype)
        p = _dropped(plan, pair, p, extra).astype(q.dtype)
        dq = _add(dq, _dot("bkgts,bksd->bkgtd", ds, kj), pair[0], plan.q_block, 3)
        dk = _add(dk, _dot("bkgts,bkgtd->bksd", ds, qi), pair[1], plan.k_block, 2)
        dv = _add(dv, _dot("bkgts,bkgtd->bksd", p, gi), pair[1], plan.k_block, 2)
        return (dq, dk, dv, d_bias), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, f32), (q, k, v, bias))
    grads = _each(step, zeros, plan.pairs())
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, (q, k, v, bias))
    return *grads, (None, None)


_attention.defvjp(_forward, _backward)


def _scores(plan: _Plan, pair: Any, q: Any, k: Any, bias: Any, extra: tuple) -> Any:
    """(key block, masked float32 scores [B, K, G, q_block, k_block], d scores / d q k^T / scale)"""
    i, j = pair
    kj, slope = _take(k, j, plan.k_block, 2), 1
    scores = _dot("bkgtd,bksd->bkgts", _take(q, i, plan.q_block, 3), kj) * plan.options.scale
    if plan.options.softcap is not None:
        t = jnp.tanh(scores / plan.options.softcap)
        scores, slope = t * plan.options.softcap, 1 - t * t
    if bias is not None:
        tile = _take(_take(bias, i, plan.q_block, 3), j, plan.k_block, 4).astype(scores.dtype)
        scores = jnp.where(tile < LOWEST, -jnp.inf, scores + tile)
    t, s = _positions(plan, pair)
    t = t + plan.S - plan.T
    seen = s < plan.S
    if plan.options.causal:
        seen &= s <= t
    if plan.options.window is not None:
        seen &= s > t - plan.options.window
    seen = seen[None]
    ids = [
        (_take(a, i, plan.q_block, 1), _take(b, j, plan.k_block, 1))
        for a, b in extra[0]
        if a is not None
    ]
    if ids:
        seen &= reduce(operator.or_, (a[:, :, None] == b[:, None, :] for a, b in ids))
    return kj, jnp.where(seen[:, None, None], scores, -jnp.inf), slope


def _positions(plan: _Plan, pair: Any) -> tuple[Any, Any]:
    """Indices of the queries [q_block, 1] and the keys [1, k_block] of a pair."""
    i, j = pair
    t = (jnp.arange(plan.q_block) + i * plan.q_block)[:, None]
    return t, (jnp.arange(plan.k_block) + j * plan.k_block)[None, :]


def _dropped(plan: _Plan, pair: Any, p: Any, extra: tuple) -> Any:
    """p [B, K, G, q_block, k_block] after dropout."""
    rate = plan.options.dropout
    if not rate:
        return p
    B, K, G = p.shape[:3]
    b = jnp.arange(B).reshape(B, 1, 1, 1, 1)
    h = jnp.arange(K * G).reshape(1, K, G, 1, 1)
    i, j = (x[None, None, None] for x in _positions(plan, pair))
    return jnp.where(kept(rate, extra[1], b, h, i, j), p / (1 - rate), 0)


def _each(step: Any, state: Any, pairs: np.ndarray) -> Any:
    """The scan over pairs; a single pair, as of a short sequence, runs without a loop."""
    if len(pairs) == 1:
        return step(state, pairs[0].tolist())[0]
    return jax.lax.scan(step, state, (pairs[:, 0], pairs[:, 1]))[0]


def _dot(spec: str, a: Array, b: Array) -> Array:
    f32 = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=f32, precision=exact(a.dtype))


def _block(n: int, most: int) -> int:
    """The smallest block, a multiple of 8, that covers n in as few blocks as `most` allows."""
    return -(-n // (-(-n // most)) // 8) * 8


def _pad(x: Any, block: int, axis: int) -> Any:
    if x is None or x.shape[axis] % block == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _take(x: Array, i: Any, block: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _put(x: Array, part: Array, i: Any, block: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * block, axis)


def _add(x: Array, part: Array, i: Any, block: int, axis: int) -> Array:
    return _put(x, _take(x, i, block, axis) + part, i, block, axis)


def _put_pair(plan: _Plan, x: Array, part: Array, pair: Any) -> Array:
    rows = _put(_take(x, pair[0], plan.q_block, 3), part, pair[1], plan.k_block, 4)
    return _put(x, rows, pair[0], plan.q_block, 3)
