"""Plain XLA: blocks of tokens, and for each the head's rows a chunk at a time.

Only the float32 logits of one block and one chunk exist. What a block needs of all its chunks is
carried from one to the next and rescaled as their maximum grows, as flash attention does with its
keys; so where the head is frozen, the product with the head that d logp / d hidden needs is made
while the logits are there: two products, not three. Blocks are cut from T, never from B, which may
be sharded. After Cut Your Losses (arXiv:2411.09009) and Liger-Kernel (arXiv:2410.10989).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mud_puppy.kernels.cross_entropy import head as rows_of
from mud_puppy.kernels.cross_entropy.stats import Shape, Stats, slope_weights
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.matmul import contract_last, exact

CHUNK_BYTES = 128 * 2**20  # of the float32 logits of a block and a chunk, on one device
BLOCK_TOKENS = 8192  # on one device
ALIGN = 128  # rows of a chunk are a multiple of this
MIN_TOKENS = 16  # of T, in a block whose logits are all there at once
LOW = -1e30  # below every logit, and finite: the difference of two is a number


class Blocks(NamedTuple):
    tokens: int  # of T, in a block
    rows: int  # of the head, in a chunk


class _Running(NamedTuple):
    """Of the chunks so far, float32 [B, C]; sums are of exp(logit - top)."""

    top: Any
    total: Any
    others: Any  # total without the target: 1 - p(target) without cancellation
    weighted: Any  # sum of exp(logit - top) (logit - top)
    target: Any  # the target's logit
    plain: Any  # sum of logits


def forward(x: Any, head: Any, y: Any, shape: Shape, blocks: Blocks | None = None) -> Stats:
    """x [B, T, D], head [V, D] (array or `Quantized`), y [B, T] -> Stats of [B, T]."""
    return _forward(x, head, y, shape, blocks, False)[0]


def forward_and_slope(
    x: Any, head: Any, y: Any, shape: Shape, blocks: Blocks | None = None
) -> tuple[Stats, Any]:
    """Also d logp / d x, [B, T, D] in x's dtype."""
    return _forward(x, head, y, shape, blocks, True)


def _forward(x: Any, head: Any, y: Any, shape: Shape, blocks: Blocks | None, slope: bool) -> Any:
    T, V, head = y.shape[1], head.shape[0], rows_of.plain(head)
    blocks = blocks or choose_blocks(x, head, slope)

    def block(x: Any, y: Any) -> Any:
        zero = jnp.zeros_like(y, jnp.float32)
        start = _Running(zero + LOW, zero, zero, zero, zero, zero)
        sums = jnp.zeros_like(x, jnp.float32) if slope else None

        def chunk(carry: Any, i: Any) -> Any:
            run, sums = carry
            rows, column, seen = _chunk(head, i, blocks.rows, x.dtype)
            logits = shape.logits(contract_last(x, rows, jnp.float32))
            hit = column == y[..., None]
            new, e = _absorb(run, logits, hit, seen)
            if slope:
                e = jnp.where(hit, 0, e * shape.derivative(logits)).astype(x.dtype)
                grown = jnp.exp(run.top - new.top)[..., None]
                sums = sums * grown + _dot(e, rows, ((2,), (0,)))
            return new, sums

        run, sums = _over_chunks(chunk, (start, sums), V, blocks.rows)
        log_total = jnp.log(run.total)
        lse = run.top + log_total
        stats = Stats(run.target - lse, log_total - run.weighted / run.total, lse, run.plain / V)
        if not slope:
            return stats, None
        pull = run.others / run.total * shape.derivative(run.target)
        target_rows = rows_of.words(head, y, x.dtype).astype(jnp.float32)
        d = pull[..., None] * target_rows - sums / run.total[..., None]
        return stats, d.astype(x.dtype)

    out = _over_blocks(block, (x, y), blocks.tokens)
    return jax.tree.map(lambda a: _whole(a, T), out)


def _absorb(run: _Running, logits: Any, hit: Any, seen: Any) -> tuple[_Running, Any]:
    """The sums with one more chunk, and its exp(logit - top)."""
    top = jnp.maximum(run.top, jnp.where(seen, logits, LOW).max(-1))
    shifted = logits - top[..., None]
    e = jnp.where(seen, jnp.exp(shifted), 0)
    grown = jnp.exp(run.top - top)
    new = _Running(
        top,
        run.total * grown + e.sum(-1),
        run.others * grown + jnp.where(hit, 0, e).sum(-1),
        # An empty sum's top is LOW and its total 0.
        grown * (run.weighted + run.total * (run.top - top)) + (e * shifted).sum(-1),
        run.target + jnp.where(hit & seen, logits, 0).sum(-1),
        run.plain + jnp.where(seen, logits, 0).sum(-1),
    )
    return new, e


def backward(
    x: Any, head: Any, y: Any, stats: Stats, g: Stats, shape: Shape, blocks: Blocks | None = None
) -> Any:
    """d x in x's dtype, from logits made again."""
    return _backward(x, head, y, stats, g, shape, blocks, False)[0]


def backward_with_head(
    x: Any, head: Any, y: Any, stats: Stats, g: Stats, shape: Shape, blocks: Blocks | None = None
) -> tuple[Any, Any]:
    """(d x in x's dtype, d head in head's), from logits made again."""
    return _backward(x, head, y, stats, g, shape, blocks, True)


def _backward(
    x: Any, head: Any, y: Any, stats: Stats, g: Stats, shape: Shape, blocks: Any, head_trains: bool
) -> tuple[Any, Any]:
    T, V, head = y.shape[1], head.shape[0], rows_of.plain(head)
    blocks = blocks or choose_blocks(x, head)
    at_target, everywhere, on_p, on_p_log_p = slope_weights(g, stats)
    weights = at_target, everywhere / V, on_p, on_p_log_p, stats.lse

    def block(d_head: Any, args: Any) -> Any:
        x, y, *weights = args
        at_target, everywhere, on_p, on_p_log_p, lse = (w[..., None] for w in weights)

        def chunk(carry: Any, i: Any) -> Any:
            d_head, dx = carry
            rows, column, seen = _chunk(head, i, blocks.rows, x.dtype)
            logits = shape.logits(contract_last(x, rows, jnp.float32))
            log_p = logits - lse
            d = everywhere + jnp.exp(log_p) * (on_p + on_p_log_p * log_p)
            d = (d + jnp.where(column == y[..., None], at_target, 0)) * shape.derivative(logits)
            d = jnp.where(seen, d, 0).astype(x.dtype)
            if head_trains:
                start = (column[0, 0, 0], 0)
                old = jax.lax.dynamic_slice(d_head, start, rows.shape)
                more = old + _dot(d, x, ((0, 1), (0, 1))).astype(old.dtype)
                d_head = jax.lax.dynamic_update_slice(d_head, more, start)
            return d_head, dx + _dot(d, rows, ((2,), (0,)))

        start = d_head, jnp.zeros_like(x, jnp.float32)
        d_head, dx = _over_chunks(chunk, start, V, blocks.rows)
        return d_head, dx.astype(x.dtype)

    cut = [_cut(a, blocks.tokens) for a in (x, y, *weights)]
    # Rounded once, as nothing is added to a row, if there is one block.
    kind = head.dtype if head_trains and len(cut[0]) == 1 else jnp.float32
    d_head = jnp.zeros_like(head, kind) if head_trains else None
    d_head, dx = jax.lax.scan(block, d_head, cut)
    return _whole(dx, T), None if d_head is None else d_head.astype(head.dtype)


def _chunk(head: Any, i: Any, size: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Chunk i: its rows, their numbers [1, 1, rows], and which are new.

    The last chunk ends with the head, and starts with rows that the one before has had.
    """
    start = jnp.minimum(i * size, head.shape[0] - size)
    column = start + jnp.arange(size, dtype=jnp.int32)
    column = column[None, None]
    return rows_of.chunk(head, start, size, dtype), column, column >= i * size


def _over_chunks(chunk: Callable, start: Any, V: int, size: int) -> Any:
    return jax.lax.scan(lambda c, i: (chunk(c, i), None), start, jnp.arange(-(-V // size)))[0]


def _over_blocks(block: Callable, xs: Any, tokens: int) -> Any:
    cut = [_cut(x, tokens) for x in xs]
    return jax.lax.scan(lambda _, args: (None, block(*args)), None, cut)[1]


def _dot(a: Any, b: Any, contract: Any) -> Any:
    dims = contract, ((), ())
    return jax.lax.dot_general(
        a, b, dims, precision=exact(a.dtype), preferred_element_type=jnp.float32
    )


def choose_blocks(x: Any, head: Any, slope: bool = False) -> Blocks:
    """CHUNK_BYTES of logits on a device, of many tokens (BLOCK_TOKENS) and few rows.

    Many tokens read and, where it trains, write the head once. A slope is otherwise: its sums
    [tokens, D] are rescaled for every chunk, so that blocks take all of an array's rows at once (on
    an H100 34.0 ms instead of 35.3, and 254 MiB instead of 320), and chunks of a head of another
    dtype or format, which must not be decoded as a whole, serve a quarter of the tokens.
    """
    (B, T, _), V = x.shape, head.shape[0]
    rows_here = B // _shards(B)
    if slope and not isinstance(head, Quantized) and head.dtype == x.dtype:
        return Blocks(_even(T, max(1, CHUNK_BYTES // (4 * V * rows_here))), V)
    most = BLOCK_TOKENS // 4 if slope else BLOCK_TOKENS
    tokens = _even(T, max(1, most // rows_here))
    units = max(1, CHUNK_BYTES // (4 * rows_here * tokens * ALIGN))
    return Blocks(tokens, min(V, _even(-(-V // ALIGN), units) * ALIGN))


def _even(n: int, most: int) -> int:
    """The size of parts of n that are at most `most` and of nearly one size."""
    return -(-n // -(-n // most))


def _shards(B: int) -> int:
    """Devices of the ambient mesh (`jax.set_mesh`), which share the batch when they divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or B % mesh.size else mesh.size


def _cut(x: Any, tokens: int) -> Any:
    """[B, T, ...] -> [n, B, C, ...], zeros after T."""
    B, T = x.shape[:2]
    n = -(-T // tokens)
    x = jnp.pad(x, [(0, 0), (0, n * tokens - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, n, tokens, *x.shape[2:]), 1, 0)


def _whole(x: Any, T: int) -> Any:
    """[n, B, C, ...] -> [B, T, ...]"""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def through_matmul(x: Any, product: Callable, y: Any, shape: Shape) -> Stats:
    """`Stats` from product(x [B, C, D]) -> logits [B, C, V], made again by the backward pass."""

    def block(x: Any, y: Any) -> Stats:
        logits = shape.logits(product(x).astype(jnp.float32))
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        shifted = logits - top
        e = jnp.exp(shifted)
        total = e.sum(-1)
        log_total = jnp.log(total)
        hit = jnp.arange(logits.shape[-1])[None, None] == y[..., None]
        logp = jnp.where(hit, shifted, 0).sum(-1) - log_total
        entropy = log_total - (e * shifted).sum(-1) / total
        return Stats(logp, entropy, top[..., 0] + log_total, logits.mean(-1))

    V = jax.eval_shape(product, x[0, :1]).shape[-1]
    return by_tokens(block, (x, y), V)


def by_tokens(block: Callable, arrays: Sequence[Any], V: int) -> Any:
    """block(*arrays [B, C, ...]) -> a tree of [B, C, ...], of C tokens at a time, whose float32
    logits of V words take CHUNK_BYTES; made again by the backward pass. arrays [B, T, ...]."""
    B, T = arrays[0].shape[:2]
    most = max(MIN_TOKENS, CHUNK_BYTES // (4 * (B // _shards(B)) * V))
    out = _over_blocks(jax.checkpoint(block), arrays, _even(T, most))
    return jax.tree.map(lambda a: _whole(a, T), out)
