"""What one attention call asks for, and which blocks of queries and keys can see each other.

A range of blocks is four numbers (low, full_low, full_high, high): blocks outside [low, high) see
nothing, those inside [full_low, full_high) see everything, so only the rest needs a mask.
"""

import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LOWEST = -1e30  # a bias below it hides its key
SEGMENTS = ("first", "end", "same_first", "same_end", "same")
MOST_PAIRS = 2**20  # of blocks that a table of segments is made from at once


@dataclass(frozen=True)
class Options:
    """What a call computes, apart from arrays. `scale` and `softcap` are those of the scores."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Options, the lengths T and S before padding, and one kernel's tile.

    heads_first: neighbouring programs are heads of one block, else blocks of one head.
    transposed: the second factor of a product that sums over tokens is read from a transposed copy
    [B, H, D, T], as RDNA's matrix instructions want runs along what they sum. chunk: columns of a
    head that a product reads at a time, at most; 0 for all (see tile.Operand). one_loop: blocks of
    which something is hidden share the loop of the others, behind a branch: no second pipeline to
    fill. row_columns: columns at a time of the sum that d_queries makes first; 0 for all.
    """

    options: Options
    T: int
    S: int
    q_block: int
    k_block: int
    num_warps: int
    num_stages: int
    heads_first: bool = True
    transposed: bool = False
    chunk: int = 0
    one_loop: bool = False
    row_columns: int = 0

    @property
    def shift(self) -> int:
        """Added to a query's index it gives the key that it sits on."""
        return self.S - self.T

    @property
    def q_blocks(self) -> int:
        return -(-self.T // self.q_block)

    @property
    def k_blocks(self) -> int:
        return -(-self.S // self.k_block)

    @property
    def pairs(self) -> int:
        """Of queries and keys that see each other in one head of one row, segments aside."""
        at = np.arange(self.T, dtype=np.int64) + self.shift + 1
        high = np.minimum(at, self.S) if self.options.causal else self.S
        low = 0 if self.options.window is None else np.maximum(at - self.options.window, 0)
        return int(np.maximum(high - low + 0 * at, 0).sum())

    def columns(self, width: int) -> int:
        """How many columns of a head of that width a product reads at a time: a power of two."""
        return min(self.chunk, width & -width) or width

    def key_range(self, i: Any) -> tuple[Any, Any, Any, Any]:
        """Range of the key blocks that query block i sees."""
        first = i * self.q_block + self.shift
        last = first + self.q_block - 1
        low, high = 0, self.S
        full_low, full_high = 0, self.S
        if self.options.causal:
            high, full_high = _min(high, last + 1), _min(full_high, first + 1)
        if self.options.window is not None:
            low, full_low = first - self.options.window + 1, last - self.options.window + 1
        return _blocks(low, full_low, full_high, high, self.k_block, self.k_blocks)

    def query_range(self, j: Any) -> tuple[Any, Any, Any, Any]:
        """Range of the query blocks that see key block j; rows after T count as seeing."""
        first = j * self.k_block - self.shift
        last = first + self.k_block - 1
        end = self.q_blocks * self.q_block
        low, high, full_low, full_high = 0, end, 0, end
        if self.options.causal:
            low, full_low = first, last
        if self.options.window is not None:
            high = _min(high, last + self.options.window)
            full_high = _min(full_high, first + self.options.window)
        return _blocks(low, full_low, full_high, high, self.q_block, self.q_blocks)

    def seen(self, t: Any, s: Any) -> Any:
        """Whether query t sees key s, segments aside."""
        t = t + self.shift
        seen = [s <= t] if self.options.causal else []
        if self.options.window is not None:
            seen.append(s > t - self.options.window)
        if self.S % self.k_block or not seen:
            seen.append(s < self.S)
        return reduce(operator.and_, seen)


def _blocks(low: Any, full_low: Any, full_high: Any, high: Any, size: int, most: int) -> Any:
    """Index ranges -> block ranges, clipped and in order: outwards for low and high."""
    high = _clip(_ceil(high, size), 0, most)
    low = _clip(_floor(low, size), 0, high)
    full_high = _clip(_floor(full_high, size), low, high)
    full_low = _clip(_ceil(full_low, size), low, full_high)
    return low, full_low, full_high, high


def _ceil(x: Any, size: int) -> Any:
    return _floor(x + size - 1, size)


def _floor(x: Any, size: int) -> Any:
    """Blocks are powers of two, and a shift rounds down below 0 too, which a GPU's / does not."""
    return x >> (size.bit_length() - 1)


# Python's integers stay Python's: inside a kernel a JAX constant could not be captured.


def _min(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _max(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _clip(x: Any, low: Any, high: Any) -> Any:
    return _min(_max(x, low), high)


def segment_ranges(plan: Plan, q_ids: Any, k_ids: Any, *, by_key: bool = False) -> dict[str, Any]:
    """`SEGMENTS`, int32 [B, blocks] each: of the key blocks that a query block meets (by_key: of
    the query blocks that a key block meets) the first and the end, and of those among them that
    hold one and the same id, so that ids hide nothing, the first, the end and how many they are.

    For ids in any order: two blocks are skipped when their ids cannot meet (neither their spans nor
    their sets modulo 32: padding, id 0 after the last, would widen a span). Work is quadratic in
    the number of blocks, memory linear. q_ids is [B, q_blocks * q_block], k_ids alike, padded with
    their last id.
    """
    least = min(plan.q_block, plan.k_block)
    q, k = _spans(q_ids, plan.q_block, least), _spans(k_ids, plan.k_block, least)
    spans, others = (k, q) if by_key else (q, k)
    n, most = spans[0].shape[1], others[0].shape[1]
    fixed = (plan.query_range if by_key else plan.key_range)(jnp.arange(n, dtype=jnp.int32))
    rows = *spans, *(jnp.broadcast_to(x, spans[0].shape) for x in (fixed[0], fixed[3]))
    at_once = max(1, MOST_PAIRS // most)  # a few megabytes
    if n <= at_once:
        found = _ranges_of_blocks(others, rows)
    else:

        def column(row: tuple) -> tuple:
            return tuple(x[:, 0] for x in _ranges_of_blocks(others, [x[:, None] for x in row]))

        found = jax.lax.map(column, tuple(x.T for x in rows), batch_size=at_once)
        found = [x.T for x in found]
    return dict(zip(SEGMENTS, found, strict=True))


def _ranges_of_blocks(others: tuple, rows: Any) -> Any:
    """`SEGMENTS`, [B, m] each, of blocks with spans, start and end [B, m], among others with spans
    [B, n]. One reduction, which XLA makes one kernel: what is left to do is the reader's."""
    low, high, ids, start, end = (x[:, :, None] for x in rows)
    other_low, other_high, other_ids = (x[:, None] for x in others)
    most = other_low.shape[-1]
    j = jnp.arange(most, dtype=jnp.int32)[None, None]
    meets = (other_low <= high) & (other_high >= low) & (other_ids & ids != 0)
    meets &= (j >= start) & (j < end)
    same = meets & (low == high) & (other_low == other_high)
    first, last, none = np.int32(most), np.int32(0), np.int32(0)

    def ends(which: Any) -> tuple[Any, Any]:
        return jnp.where(which, j, first), jnp.where(which, j + 1, last)

    def merge(a: tuple, b: tuple) -> tuple:
        ways = jnp.minimum, jnp.maximum, jnp.minimum, jnp.maximum, jnp.add
        return tuple(f(x, y) for f, x, y in zip(ways, a, b, strict=True))

    values = *ends(meets), *ends(same), same.astype(jnp.int32)
    return jax.lax.reduce(values, (first, last, first, last, none), merge, (2,))


def _spans(ids: Any, block: int, least: int) -> tuple[Any, Any, Any]:
    """Lowest id, highest id and set of ids modulo 32, of each block: [B, blocks]. By way of blocks
    of `least`, so that keys and queries of one row share the reduction."""
    ids = ids.reshape(len(ids), -1, least)
    bits = jnp.uint32(1) << (ids & 31).astype(jnp.uint32)
    union = jax.lax.reduce(bits, np.uint32(0), jax.lax.bitwise_or, (2,))
    ways = (ids.min(-1), jnp.minimum), (ids.max(-1), jnp.maximum), (union, jnp.bitwise_or)
    turns = range(block // least)
    return tuple(reduce(f, [x[:, n :: len(turns)] for n in turns]) for x, f in ways)  # pyright: ignore


def pieces(size: int) -> list[tuple[int, int]]:
    """(start, width) of the tiles that cover a head: powers of two, 96 = 64 + 32, 192 = 128 + 64.

    `size` is a multiple of 16, the least that a matrix instruction takes.
    """
    widths = [1 << b for b in reversed(range(size.bit_length())) if size >> b & 1]
    return list(zip(np.cumsum([0, *widths[:-1]]).tolist(), widths, strict=True))
