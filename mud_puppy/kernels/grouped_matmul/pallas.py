"""Pallas-Triton: one program a tile of one expert's rows and a tile of columns.

Which rows a tile has is only known on the device, and a kernel's grid is fixed before: XLA lists
the tiles (group, first row, end), ceil(M / tile) + groups - 1 at most, and those that are left over
do nothing. Tiles at the end of an array start earlier instead of reaching past it, and write only
what is theirs. Quantized weights are decoded for a few experts at a time.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mud_puppy.kernels import choice, target, tuned
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.formats import Quantized, dequantize

# Of the experts of a quantized weight that are decoded at once: all, in models up to gpt-oss.
# In two parts the gate of Qwen3-30B-A3B with 131,072 rows takes 4.6 ms both ways, in one 2.4 (H100,
# jax 0.11.2).
DECODED_BYTES = 1152 * 2**20
GROUP = 8  # row tiles that share a column tile in the L2


class Tiles(NamedTuple):
    rows: int
    columns: int
    depth: int  # of the sum, in a step of the loop
    num_warps: int
    num_stages: int
    # What the loop sums over becomes the fast axis of a copy made before: RDNA has no way to
    # transpose 16-bit tiles but LDS loads of two bytes.
    transposed: bool = False


def declines(x: Any, w: Any) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if target.current().platform not in ("cuda", "rocm", "cpu"):
        return f"Pallas-Triton has no backend for {target.current().platform}"
    if not isinstance(w, Quantized) and not jnp.issubdtype(w.dtype, jnp.floating):
        return f"the weight is {w.dtype}"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {x.dtype} is none of bfloat16, float16, float32"
    if not len(x):
        return "x has no rows"
    if w.shape[1] % 16 or w.shape[2] % 16:
        return f"a weight of {w.shape[1:]} is no multiple of 16"
    return choice.split_over_mesh(x, w)


def grouped(x: Any, w: Any, sizes: Any, transpose: bool = False, tiles: Tiles | None = None) -> Any:
    """Rows of x times their expert's weight [out, in].T (or, transposed, [out, in])."""
    tiles = tiles or tuned_tiles("d_x" if transpose else "forward", x.dtype)
    M = len(x)
    x = jnp.pad(x, [(0, max(0, 16 - M)), (0, 0)])
    if isinstance(w, Quantized):
        if len(sizes) > M:
            # A few tokens meet a few experts: only theirs are decoded, and there are M at most.
            met = jnp.argsort(sizes == 0, stable=True)[:M]
            w, sizes = jax.tree.map(lambda a: a[met], w), sizes[met]
        return _decoded(x, w, sizes, transpose, tiles)[:M]
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    # The rows after the last group are one more group, of no expert.
    ends = jnp.append(ends, len(x))
    bounds = jnp.stack([jnp.append(0, ends[:-1]), ends])
    return _call(x, w, bounds, transpose, tiles)[:M]


def _decoded(x: Any, w: Quantized, sizes: Any, transpose: bool, tiles: Tiles) -> Any:
    """`grouped` with as many experts decoded at a time as DECODED_BYTES holds."""
    E, *matrix = w.shape
    most = max(1, DECODED_BYTES // (math.prod(matrix) * x.dtype.itemsize))
    n = max(d for d in range(1, min(E, most) + 1) if E % d == 0)
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    bounds = jnp.stack([ends - sizes, ends]).reshape(2, -1, n).swapaxes(0, 1)
    parts = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]), w)

    def part(out: Any, args: Any) -> Any:
        weight, bounds = args
        y = _call(x, dequantize(weight, x.dtype), bounds, transpose, tiles)
        row = jnp.arange(len(x))[:, None]
        return jnp.where((row >= bounds[0, 0]) & (row < bounds[1, -1]), y, out), None

    zero = jnp.zeros((len(x), matrix[1 if transpose else 0]), x.dtype)
    return jax.lax.scan(part, zero, (parts, bounds))[0]


def _call(x: Any, w: Any, bounds: Any, transpose: bool, tiles: Tiles) -> Any:
    """The product of the rows in groups; bounds int32 [2, groups], first rows and ends in order.

    A group beyond the experts gives 0; rows in no group are not written.
    """
    if transpose and tiles.transposed:
        w, transpose = jnp.swapaxes(w, 1, 2), False
    (M, K), E, N = x.shape, w.shape[0], w.shape[2 if transpose else 1]
    t = tiles._replace(
        rows=min(tiles.rows, max(16, _ceil2(M // E)), _floor2(M)),
        columns=min(tiles.columns, _floor2(N)),
        depth=min(tiles.depth, K & -K),
    )
    table = _row_tiles(bounds, M, t.rows)
    run = pl.call(
        partial(_grouped_kernel, tiles=t, transpose=transpose, E=E),
        grid=(len(table) * -(-N // t.columns),),
        in_specs=[pl.BlockSpec()] * 3,
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((M, N), x.dtype),
        num_warps=t.num_warps,
        num_stages=t.num_stages,
        name="grouped_matmul_d_x" if transpose else "grouped_matmul",
        flops=2 * M * N * K,
    )
    return run(table, x, w)


def weight_gradient(x: Any, dy: Any, w: Any, sizes: Any, tiles: Tiles | None = None) -> Any:
    """[E, out, in] in w's dtype: each expert's dy.T @ x, summed in float32."""
    E, N, K = w.shape
    tiles = tiles or tuned_tiles("d_w", x.dtype)
    depth = tiles.depth
    t = tiles._replace(rows=min(tiles.rows, _floor2(N)), columns=min(tiles.columns, _floor2(K)))
    x, dy = (jnp.pad(a, [(0, -len(a) % depth), (0, 0)]) for a in (x, dy))
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    if t.transposed:
        x, dy = x.T, dy.T
    run = pl.call(
        partial(_weight_kernel, tiles=t),
        grid=(-(-N // t.rows), -(-K // t.columns), E),
        in_specs=[pl.BlockSpec()] * 3,
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((E, N, K), w.dtype),
        num_warps=t.num_warps,
        num_stages=t.num_stages,
        name="grouped_matmul_d_w",
        flops=2 * x.size * N,
    )
    return run(jnp.stack([ends - sizes, ends], axis=1), x, dy)


def _row_tiles(bounds: Any, M: int, rows: int) -> Any:
    """int32 [tiles, 3]: group, first row, end of each tile; those left over are empty."""
    first, end = bounds
    counts = (end - first + rows - 1) // rows
    after = jnp.cumsum(counts)
    groups = bounds.shape[1]
    tile = jnp.arange(-(-M // rows) + groups - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(after, tile, side="right"), groups - 1)
    start = jnp.minimum(first[group] + (tile - (after - counts)[group]) * rows, end[group])
    return jnp.stack([group, start, jnp.minimum(start + rows, end[group])], 1).astype(jnp.int32)


def _grouped_kernel(table, x, w, out, *, tiles: Tiles, transpose: bool, E: int) -> None:
    (M, K), N = x.shape, out.shape[1]
    t, j = _program(table.shape[0], -(-N // tiles.columns))
    group, first, end = table[t, 0], table[t, 1], table[t, 2]
    start = jnp.minimum(first, M - tiles.rows)
    rows = pl.ds(start, tiles.rows)
    columns = pl.ds(jnp.minimum(j * tiles.columns, N - tiles.columns), tiles.columns)
    own = jnp.minimum(group, E - 1)

    def step(k: Any, total: Any) -> Any:
        depth = pl.ds(k * tiles.depth, tiles.depth)
        a = x[rows, depth]
        b = (w[own, depth, columns] if transpose else w[own, columns, depth]).astype(a.dtype)
        return total + pl.dot(a, b, trans_b=not transpose)

    some = (first < end) & (group < E)
    steps = jnp.where(some, jnp.int32(K // tiles.depth), jnp.int32(0))
    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = jax.lax.fori_loop(0, steps, step, total)
    row = start + jnp.arange(tiles.rows, dtype=jnp.int32)
    mine = ((row >= first) & (row < end))[:, None]
    mine = jnp.broadcast_to(mine, total.shape)
    pl.store(out.at[rows, columns], total.astype(out.dtype), mask=mine)


def _weight_kernel(bounds, x, dy, out, *, tiles: Tiles) -> None:
    _, N, K = out.shape
    i, j, e = (pl.program_id(axis) for axis in range(3))
    first, end = bounds[e, 0], bounds[e, 1]
    n = pl.ds(jnp.minimum(i * tiles.rows, N - tiles.rows), tiles.rows)
    k = pl.ds(jnp.minimum(j * tiles.columns, K - tiles.columns), tiles.columns)

    def step(s: Any, total: Any) -> Any:
        at = pl.ds(s * tiles.depth, tiles.depth)
        row = s * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
        own = (row >= first) & (row < end)
        if tiles.transposed:
            a = jnp.where(own[None, :], dy[n, at], 0).astype(dy.dtype)
            return total + pl.dot(a, x[k, at], trans_b=True)
        a = jnp.where(own[:, None], dy[at, n], 0).astype(dy.dtype)
        return total + pl.dot(a, x[at, k], trans_a=True)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    last = jax.lax.div(end + tiles.depth - 1, tiles.depth)
    low = jnp.where(first < end, jax.lax.div(first, tiles.depth), last)
    total = jax.lax.fori_loop(low, last, step, total)
    out[e, n, k] = total.astype(out.dtype)


def _program(rows: int, columns: int) -> tuple[Any, Any]:
    """(row tile, column tile); GROUP row tiles take all columns before the next GROUP."""
    group, place = _divided(pl.program_id(0), GROUP * columns)
    j, down = _divided(place, jnp.minimum(rows - group * GROUP, GROUP))
    return group * GROUP + down, j


def _divided(a: Any, b: Any) -> tuple[Any, Any]:
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def tuned_tiles(kernel: str, dtype: Any) -> Tiles:
    kind = "float32" if dtype == jnp.float32 else "half"
    return tiles_of(tuned.tiles("grouped_matmul", f"{kernel} {kind}"))


def tiles_of(entry: dict[str, Any]) -> Tiles:
    """An entry of the tuned table."""
    return Tiles(**entry)


def _floor2(n: int) -> int:
    return 1 << n.bit_length() - 1


def _ceil2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
