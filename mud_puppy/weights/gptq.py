"""GPTQ (arXiv:2210.17323): codes for one weight that lose least on the inputs it was observed with.

Columns (inputs) are rounded one after the other, and the error of each is made good by the columns
that are still free, by the inverse of the Hessian H = sum 2 x^T x of the layer's squared output
error. Rows do not meet: weights that read the same inputs can be laid one under the other.

Grid of a group, as AutoGPTQ and gptqmodel store it, with top = 2^bits - 1:

    symmetric    scale = 2 max|w| / top, zero = 2^(bits - 1): code c is (c - zero) * scale
    asymmetric   scale = (max - min) / top, an integer zero in 1..top. Not 0: files hold zero - 1,
                 and readers add the one to 32 bits at once, where 0 - 1 carries into the next zero

Scales are float16 numbers, which is what files hold: the rounding of a scale is made good too.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import int4

BITS = (2, 3, 4, 8)
_BLOCK = 128  # columns after which the rest of the weight is updated, at most
_SHRINKS = 20  # clip ranges that `clip` tries: 1.00, 0.97, ... of the group's own
Codes = tuple[UInt8[Array, "out n"], Float[Array, "out G"], UInt8[Array, "out G"] | None]


def gptq(
    w: Float[Array, "out n"],
    hessian: Float[Array, "m m"],
    *,
    bits: int = 4,
    group: int | str = 64,
    symmetric: bool = True,
    act_order: bool = False,
    damp: float = 0.01,
    clip: bool = False,
) -> Codes:
    """(codes uint8 [out, in], scales float32 [out, G], zeros uint8 [out, G]; None if symmetric).

    hessian: float32 sum of x^T x, at any scale; where its diagonal is 0 an input was never seen,
    and its weights become 0. damp: share of the mean diagonal that is added to it. group: inputs
    that share a scale, or "row". A group's scale is chosen when its first column is reached, from
    weights that make good what came before. act_order: inputs of large diagonal first, scales then
    from the weights as they were, so that groups stay in the order of the inputs. clip: tries
    smaller ranges for each group, by what the errors of its weights will cost.

    Scales are NaN where the Hessian is not positive definite (not finite, or damped too little).
    """
    check(w.shape[-1], bits, group)
    if hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"expected a Hessian [in, in] for w {w.shape}, got {hessian.shape}")
    size = w.shape[1] if group == "row" else int(group)
    return _gptq(w, hessian, damp, (bits, symmetric, clip), size, act_order)


def round_to_nearest(
    w: Float[Array, "out n"],
    *,
    bits: int = 4,
    group: int | str = 64,
    symmetric: bool = True,
    clip: bool = False,
) -> Codes:
    """What `gptq` returns, of each weight by itself: the nearest code on the same grid.

    clip: tries smaller ranges for each group, by the squared error of its weights.
    """
    check(w.shape[-1], bits, group)
    size = w.shape[1] if group == "row" else int(group)
    return _round_to_nearest(w, (bits, symmetric, clip), size)


def check(inputs: int, bits: int, group: int | str) -> None:
    """ValueError unless a row of `inputs` is cut into groups, and `bits` are of BITS."""
    if bits not in BITS:
        raise ValueError(f"GPTQ has {', '.join(map(str, BITS))} bits, not {bits!r}")
    if group != "row" and (not isinstance(group, int) or group < 1):
        raise ValueError(f"expected a group size or 'row', got group={group!r}")
    if group != "row" and inputs % int(group):
        fitting = [g for g in (16, 32, 64, 128, 256) if inputs % g == 0]
        raise ValueError(f"rows of {inputs} are no multiple of the group of {group}; "
                         f"groups that fit: {fitting}")  # fmt: skip


def to_quantized(
    codes: UInt8[Array, "*L out n"],
    scales: Float[Array, "*L out G"],
    zeros: UInt8[Array, "*L out G"] | None,
    bits: int,
    dtype: Any,
) -> Quantized:
    """The weight leaf of such codes: int4 for 2, 3 and 4 bits, int8 for 8."""
    if bits == 8:
        # Both lowered by 128: the values are the same, and 128 is no zero point at all.
        own = None if zeros is None else (zeros ^ 128).astype(jnp.int8)
        return Quantized(
            (codes ^ 128).astype(jnp.int8), scales, own, format="int8", dtype=jnp.dtype(dtype)
        )
    if zeros is None and bits < 4:  # int4 without zero points means 8
        zeros = jnp.full(scales.shape, 1 << (bits - 1), jnp.uint8)
    return int4(codes, scales, zeros=zeros, dtype=dtype)


# Inside, weights are [in, out]: a column of the paper is then a row, contiguous in memory.

Grid = tuple[int, bool, bool]  # bits, symmetric, clip


@partial(jax.jit, static_argnums=(3, 4, 5))
@jax.default_matmul_precision("highest")  # GPUs would use TF32
def _gptq(w: Any, hessian: Any, damp: Any, grid: Grid, group: int, act_order: bool) -> Codes:
    diagonal = jnp.diagonal(hessian)
    seen = diagonal != 0  # true of NaN, which must not pass for an input never seen
    wt = jnp.where(seen[:, None], w.astype(jnp.float32).T, 0)
    order = jnp.argsort(-diagonal, stable=True) if act_order else None
    upper = _inverse_factor(hessian.astype(jnp.float32), seen, damp, order)
    # What an error e of column j costs when all later ones have answered it: (e / U_jj)^2.
    costs = 1 / jnp.square(jnp.diagonal(upper))
    if order is None:
        codes, scales, zeros = _pass(wt, upper, costs, grid, group)
    else:
        back = jnp.argsort(order)
        scales, zeros = _scales(wt, costs[back], grid, group)
        columns = tuple(jnp.repeat(x, group, axis=0)[order] for x in (scales, zeros))
        codes, _, _ = _pass(wt[order], upper, costs, grid, group, columns)
        codes = codes[back]
    scales = jnp.where(jnp.isfinite(upper).all(), scales, jnp.nan)
    return codes.T, scales.T, None if grid[1] else zeros.T.astype(jnp.uint8)


@partial(jax.jit, static_argnums=(1, 2))
def _round_to_nearest(w: Any, grid: Grid, group: int) -> Codes:
    wt = w.astype(jnp.float32).T
    scales, zeros = _scales(wt, jnp.ones(len(wt)), grid, group)
    scale, zero = (jnp.repeat(x, group, axis=0) for x in (scales, zeros))
    codes = _code(wt, scale, zero, grid[0]).astype(jnp.uint8)
    return codes.T, scales.T, None if grid[1] else zeros.T.astype(jnp.uint8)


def _inverse_factor(hessian: Any, seen: Any, damp: Any, order: Any) -> Any:
    """U, upper triangular, with U^T U = H^-1: row j says how columns from j on answer j's error.

    The paper factors the inverse. H = R R^T with R upper is the same U = R^-1 with one Cholesky
    (of H from its last row to its first) and no inverse that is rounded before it is factored.
    """
    diagonal = jnp.where(seen, jnp.diagonal(hessian), 1)
    h = jnp.where(seen[:, None] & seen[None, :], hessian, 0)
    h = h.at[jnp.diag_indices_from(h)].set(diagonal + damp * diagonal.mean())
    h = h if order is None else h[order][:, order]
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    r = lower[::-1, ::-1]
    eye = jnp.eye(r.shape[0], dtype=r.dtype)
    return jax.scipy.linalg.solve_triangular(r, eye, lower=False)


def _pass(
    wt: Any, upper: Any, costs: Any, grid: Grid, group: int, columns: tuple[Any, ...] | None = None
) -> tuple[Any, Any, Any]:
    """codes uint8 [in, out], and scales and zeros [G, out] where `columns` gives none per column.

    Blocks never cross a group, so that a group begins with weights that are up to date.
    """
    (n, out), bits = wt.shape, grid[0]
    block = max(d for d in range(1, _BLOCK + 1) if group % d == 0)
    per_group = group // block
    none = jnp.zeros((n // block, 0))
    given = (none, none)
    if columns is not None:
        given = tuple(x.reshape(-1, block, out) for x in columns)

    def one_block(state: Any, x: Any) -> Any:
        wt, current = state
        b, rows, own = x
        if columns is None:
            first = partial(jax.lax.dynamic_slice_in_dim, start_index=b * block, slice_size=group)
            own = current = jax.lax.cond(
                b % per_group == 0,
                lambda: _grid(first(wt), first(costs), grid),
                lambda: current,
            )
        mine = jax.lax.dynamic_slice_in_dim(wt, b * block, block)
        square = jax.lax.dynamic_slice_in_dim(rows, b * block, block, axis=1)
        per_column = jax.tree.map(lambda t: jnp.broadcast_to(t, (block, out)), own)
        codes, errors = _block(mine, square, per_column, bits)
        # The rest, and nothing before: those columns of `upper` are 0.
        return (wt - rows.T @ errors, current), (codes, *current)

    start = (wt, (jnp.zeros(out), jnp.zeros(out)))
    xs = (jnp.arange(n // block), upper.reshape(-1, block, n), given)
    _, (codes, scales, zeros) = jax.lax.scan(one_block, start, xs)
    return codes.reshape(n, out), scales[::per_group], zeros[::per_group]


def _block(w: Any, upper: Any, columns: tuple[Any, ...], bits: int) -> tuple[Any, Any]:
    """Codes of a block's columns, w [block, out], and what the columns after it have to answer."""

    def column(state: Any, x: Any) -> Any:
        w, j = state
        row, scale, zero = x
        code = _code(w[j], scale, zero, bits)
        error = (w[j] - (code - zero) * scale) / row[j]
        return (w - row[:, None] * error, j + 1), (code.astype(jnp.uint8), error)

    return jax.lax.scan(column, (w, 0), (upper, *columns))[1]


def _scales(wt: Any, costs: Any, grid: Grid, group: int) -> tuple[Any, Any]:
    """(scales, zeros), each [G, out], of all groups of wt [in, out]."""
    groups = wt.reshape(-1, group, wt.shape[1]), costs.reshape(-1, group)
    return jax.vmap(lambda x, c: _grid(x, c, grid))(*groups)


def _grid(x: Any, costs: Any, grid: Grid) -> tuple[Any, Any]:
    """(scale, zero), float32 [out], of a group x [group, out]; costs [group] of squared errors."""
    bits, symmetric, clip = grid
    top, high, low = (1 << bits) - 1, x.max(0), x.min(0)
    if symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    else:
        high = jnp.maximum(high, 0)
        # At least one step below 0: see the module's text on zero points.
        low = jnp.minimum(low, -high / (top - 1))

    def of(shrink: Any) -> tuple[Any, Any]:
        scale = (high - low) * shrink / top
        # Never 0, nor a subnormal float16, of which little is left.
        scale = jnp.maximum(scale, jnp.finfo(jnp.float16).tiny)
        scale = scale.astype(jnp.float16).astype(jnp.float32)
        middle = jnp.full_like(scale, 1 << (bits - 1))
        return scale, middle if symmetric else jnp.clip(jnp.round(-low * shrink / scale), 1, top)

    if not clip:
        return of(1.0)

    def better(best: Any, shrink: Any) -> Any:
        found = of(shrink)
        error = (costs[:, None] * (x - _value(x, *found, bits)) ** 2).sum(0)
        keep = error < best[0]
        pick = tuple(jnp.where(keep, a, b) for a, b in zip((error, *found), best, strict=True))
        return pick, None

    start = (jnp.full(x.shape[1:], jnp.inf), *of(1.0))
    shrinks = 1 - 0.03 * jnp.arange(_SHRINKS)
    return jax.lax.scan(better, start, shrinks)[0][1:]


def _code(x: Any, scale: Any, zero: Any, bits: int) -> Any:
    return jnp.clip(jnp.round(x / scale) + zero, 0, (1 << bits) - 1)


def _value(x: Any, scale: Any, zero: Any, bits: int) -> Any:
    return (_code(x, scale, zero, bits) - zero) * scale
