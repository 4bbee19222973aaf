"""What the three attention kernels do to one tile of scores, written once.

Scores are in base 2: p = 2 ** (factor * x - lse). `factor` is not folded into x where it can ride
on the multiply-add that subtracts the row's maximum. A tile is [queries, keys], or transposed
where `queries` is axis 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.attention import dropout
from mud_puppy.kernels.attention.plan import Plan, pieces

LOG2E = math.log2(math.e)
# The running maximum starts here and not at -inf, so that a row that has seen no key yet gives
# 2 ** (-inf - LOWEST) = 0 and no NaN. Scores below it count as unseen.
LOWEST = -1e30


class Tile:
    """Scores of head h in row b, for blocks of queries and keys; one of them, i or j, is fixed."""

    def __init__(
        self, plan: Plan, refs: dict, b: Any, h: Any, *, i: Any = None, j: Any = None
    ) -> None:
        self.plan, self.refs, self.b, self.h = plan, refs, b, h
        self.fixed = {"q_ids": i, "k_ids": j}
        self.queries = 1 if i is None else 0  # the axis of the queries in a tile
        self.ids = {name: self._ids(name, at) for name, at in self.fixed.items() if at is not None}

    @property
    def factor(self) -> float:
        """Multiplies the x of `Block.scores`."""
        return self.plan.options.scale * LOG2E if self.plain else 1.0

    @property
    def plain(self) -> bool:
        options = self.plan.options
        return options.softcap is None and "bias" not in self.refs and options.scale > 0

    def block(self, i: Any, j: Any, masked: bool) -> "Block":
        """Read what the block needs beside its products. To be called before them: the reads then
        wait in the shadow of the matrix instructions."""
        ids = dict(self.ids)
        for name, at in (("q_ids", i), ("k_ids", j)):
            if masked and name not in ids:
                ids[name] = self._ids(name, at)
        bias = self._bias(i, j) if "bias" in self.refs else None
        return Block(self, i, j, masked, ids["q_ids"] if masked else None, ids.get("k_ids"), bias)

    def _ids(self, name: str, at: Any) -> Any:
        if name not in self.refs:
            return None
        size = self.plan.q_block if name == "q_ids" else self.plan.k_block
        return self.refs[name][self.b, pl.ds(at * size, size)]

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
class Block:
    """One block of queries and keys of a `Tile`, with its ids and bias where it has them."""

    tile: Tile
    i: Any
    j: Any
    masked: bool
    q_ids: Any
    k_ids: Any
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
        if self.masked:
            x = jnp.where(self._seen(), x, -math.inf)
        return x, slope

    def kept(self) -> Any:
        """Of dropout."""
        tile, (t, s) = self.tile, self._positions()
        return dropout.kept(tile.plan.options.dropout, tile.refs["seed"][0], tile.b, tile.h, t, s)

    def _seen(self) -> Any:
        seen = self.tile.plan.seen(*self._positions())
        if self.q_ids is not None:
            seen &= self.tile.along_queries(self.q_ids) == self.tile.along_keys(self.k_ids)
        return seen

    def _positions(self) -> tuple[Any, Any]:
        plan = self.tile.plan
        t = self.i * plan.q_block + jnp.arange(plan.q_block, dtype=jnp.int32)
        s = self.j * plan.k_block + jnp.arange(plan.k_block, dtype=jnp.int32)
        return self.tile.along_queries(t), self.tile.along_keys(s)


def _tanh(x: Any) -> Any:
    """Absolute error 1e-7; for large x the power is infinite and the quotient 0."""
    return 1 - 2 / (1 + pl.exp2(x * (2 * LOG2E)))


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
    """carry = step(block, carry, masked) over a range of blocks, whose middle needs no mask.

    The blocks before and after the middle are one loop: each loop starts its pipeline anew.
    """
    low, full_low, full_high, high = bounds
    if plan.one_loop:
        return _loop(low, high, lambda n, carry: step(n, carry, True), carry)
    before = full_low - low

    def masked(n: Any, carry: Any) -> Any:
        if isinstance(before, int) and before == 0:
            return step(full_high + n, carry, True)
        return step(jnp.where(n < before, low + n, full_high + n - before), carry, True)

    carry = _loop(full_low, full_high, lambda n, carry: step(n, carry, False), carry)
    return _loop(0, before + high - full_high, masked, carry)


def _loop(start: Any, stop: Any, body: Callable, carry: Any) -> Any:
    if isinstance(start, int) and isinstance(stop, int) and start >= stop:
        return carry
    return jax.lax.fori_loop(start, stop, body, carry)


def ranges(plan: Plan, refs: dict, b: Any, n: Any, *, by_key: bool = False) -> tuple:
    """Bounds for `over`: from the table of segments, else by arithmetic."""
    if "ranges" in refs:
        return tuple(refs["ranges"][b, n, c] for c in range(4))
    return (plan.query_range if by_key else plan.key_range)(n)
