"""What the three attention kernels do to one tile of scores, written once.

Scores are in base 2: p = 2 ** (factor * x - lse). `factor` is not folded into x where it can ride
on the multiply-add that subtracts the row's maximum. A tile is [queries, keys], or transposed
where `queries` is axis 1.
"""

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels import target
from mud_puppy.kernels.attention import dropout
from mud_puppy.kernels.attention.plan import SEGMENTS, Plan, pieces

LOG2E = math.log2(math.e)
# The running maximum starts here and not at -inf, so that a row that has seen no key yet gives
# 2 ** (-inf - LOWEST) = 0 and no NaN. Scores below it count as unseen.
LOWEST = -1e30


class Tile:
    """Scores of head h in row b, for blocks of queries and keys; one of them, i or j, is fixed.

    way: of `each_way`, whose ids are compared."""

    def __init__(
        self, plan: Plan, refs: dict, way: Any, b: Any, h: Any, *, i: Any = None, j: Any = None
    ) -> None:
        self.plan, self.refs, self.way, self.b, self.h = plan, refs, way, b, h
        self.queries = 1 if i is None else 0  # the axis of the queries in a tile
        fixed = {"q_ids": i, "k_ids": j}
        self.ids = {name: self._ids(name, at) for name, at in fixed.items() if at is not None}

    @property
    def factor(self) -> float:
        """Multiplies the x of `Block.scores`."""
        return self.plan.options.scale * LOG2E if self.plain else 1.0

    @property
    def plain(self) -> bool:
        options = self.plan.options
        return options.softcap is None and "bias" not in self.refs and options.scale > 0

    def of_head(self, g: Any) -> "Tile":
        """The same g heads further."""
        other = copy.copy(self)
        other.h = self.h + g
        return other

    def block(self, i: Any, j: Any, hidden: "Hidden") -> "Block":
        """Read what the block needs beside its products. To be called before them: the reads then
        wait in the shadow of the matrix instructions."""
        ids = self.both_ids(i, j) if hidden.by_id is True else None
        return Block(self, i, j, hidden, ids, self._bias(i, j) if "bias" in self.refs else None)

    def both_ids(self, i: Any, j: Any) -> tuple[Any, Any]:
        """Those of the queries, those of the keys."""
        q_ids, k_ids = (
            self.ids[name] if name in self.ids else self._ids(name, at)
            for name, at in (("q_ids", i), ("k_ids", j))
        )
        return q_ids, k_ids

    def _ids(self, name: str, at: Any) -> Any:
        if name not in self.refs:
            return None
        size = self.plan.q_block if name == "q_ids" else self.plan.k_block
        return self.refs[name][self.way, self.b, pl.ds(at * size, size)]

    def _bias(self, i: Any, j: Any) -> Any:
        plan, bias = self.plan, self.refs["bias"]
        b, h = self.b * (bias.shape[0] > 1), self.h * (bias.shape[1] > 1)
        rows, columns = pl.ds(i * plan.q_block, plan.q_block), pl.ds(j * plan.k_block, plan.k_block)
        x = pl.load(bias.at[b, h, rows, columns]).astype(jnp.float32)
        return x.T if self.queries else x

    def along_queries(self, x: Any) -> Any:
        """[q_block] with an axis of one key."""
        return x[None, :] if self.queries else x[:, None]

    def along_keys(self, x: Any) -> Any:
        return x[:, None] if self.queries else x[None, :]


@dataclass(frozen=True)
class Hidden:
    """Whether positions, and whether ids, may hide some of a block: known when compiling, or else a
    scalar, on which the kernel branches."""

    by_position: Any
    by_id: Any


@dataclass(frozen=True)
class Block:
    """One block of queries and keys of a `Tile`, with its ids and bias where it has them."""

    tile: Tile
    i: Any
    j: Any
    hidden: "Hidden"
    ids: tuple[Any, Any] | None
    bias: Any

    def scores(self, products: Any) -> tuple[Any, Any]:
        """(x, d softcapped scores / d scores or None) from q k^T."""
        options, slope = self.tile.plan.options, None
        x = products
        if options.softcap is not None:
            t = _tanh(x * (options.scale / options.softcap))
            x, slope = t * (options.softcap * LOG2E), 1 - t * t
        elif not self.tile.plain:
            x = x * (options.scale * LOG2E)
        if self.bias is not None:
            x = x + self.bias * LOG2E
        return self._hide(x), slope

    def _hide(self, x: Any) -> Any:
        """x with -inf for what is not seen."""
        tests = (self.hidden.by_position, self._seen), (self.hidden.by_id, self._same_id)
        if found := [test() for hidden, test in tests if hidden is True]:
            x = jnp.where(reduce(operator.and_, found), x, -math.inf)
        for hidden, test in tests:
            if not isinstance(hidden, bool):
                hide = partial(lambda test, x: jnp.where(test(), x, -math.inf), test)
                x = jax.lax.cond(hidden, hide, lambda x: x, x)
        return x

    def _seen(self) -> Any:
        return self.tile.plan.seen(*self._positions())

    def _same_id(self) -> Any:
        q_ids, k_ids = self.ids or self.tile.both_ids(self.i, self.j)
        return self.tile.along_queries(q_ids) == self.tile.along_keys(k_ids)

    def kept(self) -> Any:
        """Of dropout."""
        tile, (t, s) = self.tile, self._positions()
        return dropout.kept(tile.plan.options.dropout, tile.refs["seed"][0], tile.b, tile.h, t, s)

    def _positions(self) -> tuple[Any, Any]:
        plan = self.tile.plan
        t = self.i * plan.q_block + jnp.arange(plan.q_block, dtype=jnp.int32)
        s = self.j * plan.k_block + jnp.arange(plan.k_block, dtype=jnp.int32)
        return self.tile.along_queries(t), self.tile.along_keys(s)


def _tanh(x: Any) -> Any:
    """Absolute error 1e-7; for large x the power is infinite and the quotient 0."""
    return 1 - 2 / (1 + pl.exp2(x * (2 * LOG2E)))


def power(x: Any, factor: float, minus: Any) -> Any:
    """2 ** (factor * x - minus). ptxas does not contract a product and a sum by itself; on AMD one
    instruction instead of two changes the allocation of registers for the worse."""
    if target.current().platform == "cuda":
        return pl.exp2(pl.fma(x, factor, -minus))
    return pl.exp2(x * factor - minus)


def heads(ref: Any, b: Any, start: Any, size: int, h: Any) -> list:
    """Rows [start, start + size) of head h of [B, T, H, D], as tiles of powers of two."""
    return [pl.load(ref.at[b, pl.ds(start, size), h, pl.ds(*p)]) for p in pieces(ref.shape[-1])]


def columns(ref: Any, b: Any, start: Any, size: int, h: Any) -> list:
    """Columns [start, start + size) of head h of [B, H, D, T]: tiles [width, size]."""
    return [pl.load(ref.at[b, h, pl.ds(*p), pl.ds(start, size)]) for p in pieces(ref.shape[2])]


class Operand:
    """Rows [start, start + size) of head h of arrays by name; `keep` are read at once.

    With plan.chunk the products of two heads are summed in a loop that reads that many columns at
    a time, which keeps whole heads out of the registers of an RDNA wave. The number of turns comes
    from memory, or LLVM would unroll the loop and read it all before.
    """

    def __init__(self, plan: Plan, refs: dict, *at: Any, keep: tuple[str, ...] = ()) -> None:
        self.plan, self.refs, self.at = plan, refs, at
        self.tiles: dict[str, list] = {}
        for name in keep:
            if not self._streams(name):
                self.read(name)

    def read(self, name: str) -> list:
        if name not in self.tiles:
            self.tiles[name] = heads(self.refs[name], *self.at)
        return self.tiles[name]

    def summed(self, name: str) -> list:
        """The array as the second factor of a product that sums over its rows."""
        if self.plan.transposed:
            return columns(self.refs[f"{name}_t"], *self.at)
        return self.read(name)

    def products(self, name: str, other: "Operand", other_name: str) -> Any:
        """own @ other^T [size, other's size]"""
        if not self._streams(name):
            return products(self.read(name), other.read(other_name))
        size = self.plan.columns(self.refs[name].shape[-1])

        def step(c: Any, total: Any) -> Any:
            part = pl.ds(c * size, size)
            return total + pl.dot(self.part(name, part), other.part(other_name, part), trans_b=True)

        zero = jnp.zeros((self.at[2], other.at[2]), jnp.float32)
        return jax.lax.fori_loop(0, self.refs[f"{name}_chunks"][0], step, zero)

    def part(self, name: str, columns: Any) -> Any:
        b, start, size, h = self.at
        return pl.load(self.refs[name].at[b, pl.ds(start, size), h, columns])

    def _streams(self, name: str) -> bool:
        return f"{name}_chunks" in self.refs


def kv_head(refs: dict, h: Any) -> Any:
    """The key head that query head h reads."""
    return divided(h, refs["q"].shape[2] // refs["k"].shape[2])[0]


def divided(x: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of x >= 0. (Triton's lowering takes a constant 1 for a bool.)"""
    return (x, 0 * x) if by == 1 else (jax.lax.div(x, by), jax.lax.rem(x, by))


def products(a: list, b: list) -> Any:
    """a @ b^T over the pieces of a head."""
    total = pl.dot(a[0], b[0], trans_b=True)
    for x, y in zip(a[1:], b[1:], strict=True):
        total += pl.dot(x, y, trans_b=True)
    return total


def accumulate(sums: tuple, weights: Any, tiles: list, transposed: bool) -> tuple:
    """sums + weights @ each tile [n, width], or [width, n] where transposed."""
    weights = weights.astype(tiles[0].dtype)
    pairs = zip(sums, tiles, strict=True)
    return tuple(total + pl.dot(weights, tile, trans_b=transposed) for total, tile in pairs)


def zeros(rows: int, size: int) -> tuple:
    return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in pieces(size))


def write(ref: Any, b: Any, start: Any, size: int, h: Any, tiles: tuple) -> None:
    """The inverse of `heads`, in the dtype of ref."""
    for p, tile in zip(pieces(ref.shape[-1]), tiles, strict=True):
        pl.store(ref.at[b, pl.ds(start, size), h, pl.ds(*p)], tile.astype(ref.dtype))


def over(plan: Plan, bounds: tuple, step: Callable, carry: Any) -> Any:
    """carry = step(block, carry, Hidden) over `ranges`.

    Without plan.one_loop the middle, where nothing is hidden, is a loop of its own; the blocks
    before and after it are one: each loop starts its pipeline anew.
    """
    low, full_low, full_high, high, same = bounds
    if plan.one_loop:

        def either(n: Any, carry: Any) -> Any:
            by_id = False if same is None else (n < same[0]) | (n >= same[1])
            return step(n, carry, Hidden((n < full_low) | (n >= full_high), by_id))

        return _loop(low, high, either, carry)
    if same is not None:
        full_low = jnp.clip(jnp.maximum(full_low, same[0]), low, high)
        full_high = jnp.clip(jnp.minimum(full_high, same[1]), full_low, high)
    before = full_low - low
    hidden = Hidden(True, same is not None)

    def rest(n: Any, carry: Any) -> Any:
        if isinstance(before, int) and before == 0:
            return step(full_high + n, carry, hidden)
        return step(jnp.where(n < before, low + n, full_high + n - before), carry, hidden)

    shown = Hidden(False, False)
    carry = _loop(full_low, full_high, lambda n, carry: step(n, carry, shown), carry)
    return _loop(0, before + high - full_high, rest, carry)


def times(bounds: tuple, size: int) -> tuple:
    """The bounds of `over` for a loop that takes each block `size` times in a row."""
    *blocks, same = bounds
    return *(n * size for n in blocks), same and tuple(n * size for n in same)


def _loop(start: Any, stop: Any, body: Callable, carry: Any) -> Any:
    if isinstance(start, int) and isinstance(stop, int) and start >= stop:
        return carry
    return jax.lax.fori_loop(start, stop, body, carry)


def each_way(refs: dict, visit: Callable, carry: Any) -> Any:
    """carry = visit(way, carry) for each way in which ids let a query see a key: by its segment's,
    and by those of the prefix that it reads. A loop, since the code of both would take the
    registers of both."""
    ways = refs["q_ids"].shape[0] if "q_ids" in refs else 1
    return visit(0, carry) if ways == 1 else jax.lax.fori_loop(0, ways, visit, carry)


def ranges(plan: Plan, refs: dict, way: Any, b: Any, n: Any, *, by_key: bool = False) -> tuple:
    """(low, full_low, full_high, high, same) for `over`: blocks to visit, those of which positions
    hide nothing, and (first, end) of those of which ids hide nothing, or None without ids."""
    low, full_low, full_high, high = (plan.query_range if by_key else plan.key_range)(n)
    if "first" not in refs:
        return low, full_low, full_high, high, None
    low, high, same_first, same_end, same = (refs[name][way, b, n] for name in SEGMENTS)
    # With others between the same, which only unordered ids have, all are compared.
    same_end = jnp.where(same_end - same_first == same, same_end, 0)
    return jnp.minimum(low, high), full_low, full_high, high, (same_first, same_end)
