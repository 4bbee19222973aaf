"""Pallas-Triton: a GEMM whose epilogue reduces each tile of logits, which never reach memory.

`score` writes for each (token tile, vocabulary tile) the tile's maximum and sums, float32 in base
2, and XLA adds them up over the vocabulary. For a frozen head it also writes exp(logit - tile's
maximum) of one block of tokens in the compute dtype, and one product with the head makes
d logp / d hidden of it. `slope` makes the logits again and writes the loss's slope in each of
them, again for one block of tokens; the products with it are XLA's.

Tiles at the ends overlap the ones before them instead of reaching past the array, so that no load
in the loop needs a mask. D is a multiple of 16, and there are 16 tokens and 16 words at least.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mud_puppy.kernels import choice, tuned
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.cross_entropy.stats import Shape, Stats, slope_weights
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.matmul import exact

BLOCK_BYTES = 128 * 2**20  # of one block's [tokens, V] in the compute dtype
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LOW = -1e30  # below every logit, and finite: the difference of two is a number
GROUP = 8  # token tiles that share a vocabulary tile in the L2


def declines(x: Any, head: Any) -> str | None:
    """Why this implementation cannot serve the call, or None."""
    if isinstance(head, Quantized):
        return "the head is quantized"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"hidden is {x.dtype}"
    if x.shape[2] % 16:
        return f"the width {x.shape[2]} is no multiple of 16"
    if x.shape[0] * x.shape[1] < 16 or len(head) < 16:
        return "fewer than 16 tokens or words"
    return choice.split_over_mesh(x, head)


class Tiles(NamedTuple):
    tokens: int
    rows: int  # of the head
    depth: int  # of D, in a step of the loop
    num_warps: int
    num_stages: int

    def fit(self, N: int, V: int, D: int) -> "Tiles":
        """The largest powers of two within these that the arrays can fill."""
        depth = min(self.depth, D & -D)
        return self._replace(
            tokens=min(self.tokens, _floor2(N)), rows=min(self.rows, _floor2(V)), depth=depth
        )


def forward(x: Any, head: Any, y: Any, shape: Shape, tiles: Tiles | None = None) -> Stats:
    """x [B, T, D], head [V, D], y [B, T] -> Stats of [B, T]."""
    tiles = tiles or tuned_tiles("score", x.dtype)
    parts = score(x.reshape(-1, x.shape[2]), head.astype(x.dtype), y.reshape(-1), shape, tiles)
    return jax.tree.map(lambda a: a.reshape(y.shape), _combine(parts, len(head))[0])


def forward_and_slope(
    x: Any, head: Any, y: Any, shape: Shape, tiles: Tiles | None = None
) -> tuple[Stats, Any]:
    """Also d logp / d x, [B, T, D] in x's dtype."""
    w, V = head.astype(x.dtype), len(head)
    tiles = tiles or tuned_tiles("score", x.dtype)

    def block(x: Any, y: Any) -> Any:
        size = tiles.fit(len(x), V, x.shape[1]).rows
        parts = score(x, w, y, shape, tiles, write=True)
        stats, others, share = _combine(parts, V)
        p = (parts.e * _columns(share, size, V)).astype(x.dtype)
        pull = others * shape.derivative(parts.target * LN_2)
        d = pull[:, None] * w[y].astype(jnp.float32) - _product(p, w)
        return stats, d.astype(x.dtype)

    out = _over_blocks(block, V, x, y)
    return jax.tree.map(lambda a: _whole(a, y), out)


def backward(
    x: Any, head: Any, y: Any, stats: Stats, g: Stats, shape: Shape, tiles: Tiles | None = None
) -> Any:
    """d x in x's dtype, from logits made again."""
    w, V, tiles = head.astype(x.dtype), len(head), tiles or tuned_tiles("slope", x.dtype)
    at_target, everywhere, on_p, on_p_log_p = slope_weights(g, stats)
    weights = at_target, everywhere / V, on_p, on_p_log_p, stats.lse

    def block(x: Any, y: Any, *weights: Any) -> Any:
        d = slope(x, w, y, jnp.stack(weights), shape, tiles)
        return _product(d, w).astype(x.dtype)

    return _whole(_over_blocks(block, V, x, y, *weights), y)


class _Score(NamedTuple):
    """Of tiles of logits in base 2. The target stands alone: 1 - p(target) has no cancellation."""

    top: Any  # maximum of all but the target: [tiles of V, N], and so the next three
    others: Any  # sum of 2^(logit - top) of all but the target
    weighted: Any  # the same times logit - top
    plain: Any  # sum of all logits
    target: Any  # the target's logit: [N]
    e: Any  # d logits / d raw times 2^(logit - top), 0 at the target: [N, V], or None


def _combine(score: _Score, V: int) -> tuple[Stats, Any, Any]:
    """(Stats [N], 1 - p(target) [N], what turns each tile's e into p [tiles, N])."""
    top = jnp.maximum(score.top.max(0), score.target)
    at_target = jnp.exp2(score.target - top)
    factor = jnp.exp2(score.top - top[None])
    others = (factor * score.others).sum(0)
    weighted = (factor * (score.weighted + score.others * (score.top - top[None]))).sum(0)
    total = others + at_target
    lse = top + jnp.log2(total)
    mean = score.plain.sum(0) * (LN_2 / V)
    entropy = jnp.log2(total) - (weighted + at_target * (score.target - top)) / total
    stats = Stats((score.target - lse) * LN_2, entropy * LN_2, lse * LN_2, mean)
    return stats, others / total, factor / total[None]


def _columns(share: Any, tile: int, V: int) -> Any:
    """share [tiles, N] for every column of its tile: [N, V]."""
    return jnp.repeat(share.T, tile, axis=1)[:, :V]


def score(x: Any, w: Any, y: Any, shape: Shape, tiles: Tiles, write: bool = False) -> _Score:
    N, D, V = *x.shape, len(w)
    tiles = tiles.fit(N, V, D)
    rows, columns = -(-N // tiles.tokens), -(-V // tiles.rows)
    f32 = jax.ShapeDtypeStruct((columns, N), jnp.float32)
    out = [f32, f32, f32, f32, jax.ShapeDtypeStruct((N,), jnp.float32)]
    if write:
        out.append(jax.ShapeDtypeStruct((N, V), x.dtype))
    run = pl.call(
        partial(_score_kernel, shape=shape, tiles=tiles, sizes=(N, V, D)),
        grid=(rows * columns,),
        in_specs=[pl.BlockSpec()] * 3,
        out_specs=[pl.BlockSpec()] * len(out),
        out_shape=out,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name="cross_entropy_score" + ("_write" if write else ""),
        flops=2 * N * V * D,
    )
    return _Score(*run(x, w, y), *([] if write else [None]))


def _score_kernel(x, w, y, top, others, weighted, plain, target, *e, shape, tiles, sizes):
    i_at, j, word, new, logits = _tile(x, w, shape, tiles, sizes)
    logits = logits * LOG2_E
    here = jnp.arange(tiles.rows, dtype=jnp.int32)[None, :] == (y[i_at] - word)[:, None]
    if new is not None:
        here &= new
    # One tile has a token's target, and it alone writes.
    found = jnp.where(here, logits, LOW).max(1)
    pl.store(target.at[i_at], found, mask=found > LOW)
    plain[j, i_at] = (logits if new is None else jnp.where(new, logits, 0.0)).sum(1)
    rest = jnp.where(~here if new is None else ~here & new, logits, LOW)
    # Not LOW, where nothing else is in the tile: its difference from LOW must be large.
    highest = jnp.maximum(rest.max(1), 0.5 * LOW)
    shifted = rest - highest[:, None]
    values = pl.exp2(shifted)
    top[j, i_at] = highest
    others[j, i_at] = values.sum(1)
    weighted[j, i_at] = (values * shifted).sum(1)
    if e:
        values *= shape.derivative(logits * LN_2)
        _write(e[0], i_at, word, values, new)


def slope(x: Any, w: Any, y: Any, weights: Any, shape: Shape, tiles: Tiles) -> Any:
    """[N, V] in x's dtype: the loss's slope in each of hidden @ w.T; weights [5, N]."""
    N, D, V = *x.shape, len(w)
    tiles = tiles.fit(N, V, D)
    run = pl.call(
        partial(_slope_kernel, shape=shape, tiles=tiles, sizes=(N, V, D)),
        grid=(-(-N // tiles.tokens) * -(-V // tiles.rows),),
        in_specs=[pl.BlockSpec()] * 4,
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((N, V), x.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name="cross_entropy_slope",
        flops=2 * N * V * D,
    )
    return run(x, w, y, weights)


def _slope_kernel(x, w, y, weights, out, *, shape, tiles, sizes):
    at, _, word, new, logits = _tile(x, w, shape, tiles, sizes)
    at_target, everywhere, on_p, on_p_log_p, lse = (weights[k, at][:, None] for k in range(5))
    here = jnp.arange(tiles.rows, dtype=jnp.int32)[None, :] == (y[at] - word)[:, None]
    log_p = logits - lse
    d = everywhere + pl.exp2(log_p * LOG2_E) * (on_p + on_p_log_p * log_p)
    d = (d + jnp.where(here, at_target, 0.0)) * shape.derivative(logits)
    _write(out, at, word, d, new)


def _tile(x, w, shape: Shape, tiles: Tiles, sizes: tuple[int, int, int]) -> tuple:
    """This program's (tokens, vocabulary tile, its first word, new words or None for all, logits).

    Programs walk GROUP token tiles and all vocabulary tiles before the next GROUP.
    """
    N, V, D = sizes
    rows, columns = -(-N // tiles.tokens), -(-V // tiles.rows)
    group, place = _divmod(pl.program_id(0), GROUP * columns)
    j, down = _divmod(place, jnp.minimum(rows - group * GROUP, GROUP))
    first = jnp.minimum((group * GROUP + down) * tiles.tokens, N - tiles.tokens)
    word = jnp.minimum(j * tiles.rows, V - tiles.rows)
    at, words = pl.ds(first, tiles.tokens), pl.ds(word, tiles.rows)

    def step(k: Any, raw: Any) -> Any:
        depth = pl.ds(k * tiles.depth, tiles.depth)
        return raw + pl.dot(x[at, depth], w[words, depth], trans_b=True)

    raw = jnp.zeros((tiles.tokens, tiles.rows), jnp.float32)
    raw = jax.lax.fori_loop(0, D // tiles.depth, step, raw)
    new = None
    if V % tiles.rows:
        new = (word + jnp.arange(tiles.rows, dtype=jnp.int32) >= j * tiles.rows)[None, :]
    return at, j, word, new, shape.logits(raw)


def _write(out: Any, at: Any, word: Any, values: Any, new: Any) -> None:
    where = out.at[at, pl.ds(word, values.shape[1])]
    mask = None if new is None else jnp.broadcast_to(new, values.shape)
    pl.store(where, values.astype(out.dtype), mask=mask)


def _divmod(a: Any, b: Any) -> tuple[Any, Any]:
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def _product(a: Any, b: Any) -> Any:
    """a @ b in float32, and float32 is not tf32, as in the kernels."""
    return jnp.matmul(a, b, precision=exact(a.dtype), preferred_element_type=jnp.float32)


def _over_blocks(block: Callable, V: int, x: Any, *rest: Any) -> Any:
    """Maps over blocks of tokens, [C, ...] of [B, T, ...]; zeros after the last."""
    N = x.shape[0] * x.shape[1]
    n = -(-N * V * x.dtype.itemsize // BLOCK_BYTES)
    size = max(16, -(-N // n))

    def cut(a: Any) -> Any:
        a = a.reshape(N, *a.shape[2:])
        a = jnp.pad(a, [(0, n * size - N)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(n, size, *a.shape[1:])

    return jax.lax.map(lambda args: block(*args), tuple(cut(a) for a in (x, *rest)))


def _whole(a: Any, y: Any) -> Any:
    """[n, C, ...] -> [B, T, ...]"""
    return a.reshape(-1, *a.shape[2:])[: y.size].reshape(*y.shape, *a.shape[2:])


def _floor2(n: int) -> int:
    return 1 << n.bit_length() - 1


def tuned_tiles(kernel: str, dtype: Any) -> Tiles:
    kind = "float32" if dtype == jnp.float32 else "half"
    return Tiles(**tuned.tiles("cross_entropy", f"{kernel} {kind}"))
