"""GPTQ (arXiv:2210.17323): codes for one weight that lose least on the inputs it was observed with.

Columns (inputs) are rounded one after the other, and the error of each is made good by the columns
that are still free, by the inverse of the Hessian H = sum 2 x^T x of the layer's squared output
error. Rows do not meet: weights that read the same inputs can be laid one under the other. The grid
of codes is `gptq_grid`'s.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.weights.gptq_grid import (
    BITS,
    Codes,
    Grid,
    check,
    code_of,
    grid_of,
    round_to_nearest,
    scales_of,
    to_quantized,
)

__all__ = ["BITS", "Codes", "check", "gptq", "round_to_nearest", "to_quantized"]

_BLOCK = 128  # columns after which the rest of the weight is updated, at most


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


# Inside, weights are [in, out]: a column of the paper is then a row, contiguous in memory.


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
        scales, zeros = scales_of(wt, costs[back], grid, group)
        columns = tuple(jnp.repeat(x, group, axis=0)[order] for x in (scales, zeros))
        codes, _, _ = _pass(wt[order], upper, costs, grid, group, columns)
        codes = codes[back]
    scales = jnp.where(jnp.isfinite(upper).all(), scales, jnp.nan)
    return codes.T, scales.T, None if grid[1] else zeros.T.astype(jnp.uint8)


def _inverse_factor(hessian: Any, seen: Any, damp: Any, order: Any) -> Any:
    """U, upper triangular, with U^T U = H^-1: row j says how columns from j on answer j's error.

    The paper factors the inverse. H = R R^T with R upper is the same U = R^-1 with one Cholesky
    (of H from its last row to its first) and no inverse that is rounded before it is factored.
    """
    mean = jnp.mean(jnp.diagonal(hessian), where=seen)
    mean = jnp.where(seen.any(), mean, 1)
    diagonal = jnp.where(seen, jnp.diagonal(hessian), mean)
    h = jnp.where(seen[:, None] & seen[None, :], hessian, 0)
    h = h.at[jnp.diag_indices_from(h)].set(diagonal + damp * mean)
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
                lambda: grid_of(first(wt), first(costs), grid),
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
        code = code_of(w[j], scale, zero, bits)
        error = (w[j] - (code - zero) * scale) / row[j]
        return (w - row[:, None] * error, j + 1), (code.astype(jnp.uint8), error)

    return jax.lax.scan(column, (w, 0), (upper, *columns))[1]
