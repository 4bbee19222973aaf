"""The fused product as a Pallas-Triton kernel: codes are decoded in registers and multiplied there.

One program makes out^T[rows, x rows] = W[rows, part of K] x^T: the weight stands on the left of the
matrix instruction, so that its decoded numbers go from the decoder into it without shared memory,
and few rows of x waste least. Parts of K (`splits`) are summed by XLA in a fixed order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.quantized_matmul import decode, operands
from mud_puppy.kernels.quantized_matmul.plan import Plan


def product(plan: Plan, x: Any, w: Quantized) -> Any:
    """x[M, in] @ w[out, in].T -> [M, out] in x's dtype; `plan` is for these shapes."""
    M, N = x.shape[0], w.shape[0]
    inputs = operands.inputs(plan, x, w)
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        _program(plan, w.format, dict(zip(names, refs, strict=False)), refs[-1])

    partial = jnp.float32 if plan.splits > 1 else x.dtype
    run = pl.call(
        kernel,
        # Two axes, so that vmap can add the third.
        grid=(N // plan.rows, plan.splits * -(-M // plan.x_rows)),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((plan.splits, M, N), partial),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name=f"quantized_matmul_{w.format}",
        flops=2 * M * math.prod(w.shape),
    )
    out = run(*inputs.values())
    return out.sum(0).astype(x.dtype) if plan.splits > 1 else out[0]


def _program(plan: Plan, format: str, refs: dict, out_ref: Any) -> None:
    x_ref, words_ref = refs["x"], refs["words"]
    M = out_ref.shape[1]
    spans, size = words_ref.shape[-2:]
    lead = operands.lead(refs)
    row, other = pl.program_id(0), pl.program_id(1)
    x_row, split = lax.div(other, plan.splits), lax.rem(other, plan.splits)
    rows, x_rows = pl.ds(row * plan.rows, plan.rows), pl.ds(x_row * plan.x_rows, plan.x_rows)
    steps = spans // plan.splits // plan.spans
    inside = (x_row * plan.x_rows + jnp.arange(plan.x_rows, dtype=jnp.int32) < M)[:, None]
    whole = M % plan.x_rows == 0

    def load_x(e: int, columns: Any) -> Any:
        own = x_ref.at[pl.ds(e * M + x_row * plan.x_rows, plan.x_rows), columns]
        if whole:
            return pl.load(own)
        return pl.load(own, mask=jnp.broadcast_to(inside, (plan.x_rows, columns.size)), other=0.0)

    def step(i: Any, sums: Any) -> Any:
        first = (split * steps + i) * plan.spans
        words = pl.load(words_ref.at[(*lead, rows, pl.ds(first, plan.spans), slice(None))])
        scales, zeros, minimum = operands.scales(plan, refs, lead, row, first)
        columns = pl.ds(first * size, plan.spans * size)
        tiles = decode.planes(words, format, x_ref.dtype, scales, zeros, minimum)
        for e, tile in enumerate(tiles):
            tile = tile.reshape(plan.rows, plan.spans * size)
            sums += pl.dot(tile, load_x(e, columns), trans_b=True)
        return sums

    start = jnp.zeros((plan.rows, plan.x_rows), jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, (plan.num_warps, 32), 1)
    if (table := decode.table(format, x_ref.dtype, lane)) is not None:
        start += (table.min() < 0).astype(jnp.float32)  # it is not, but so the table is kept
    sums = lax.fori_loop(0, steps, step, start)
    if plan.row_scales:
        sums *= pl.load(refs["scales"].at[(*lead, rows, pl.ds(0, 1))]).astype(jnp.float32)
    y = sums.T.astype(out_ref.dtype)
    if whole:
        pl.store(out_ref.at[split, x_rows, rows], y)
    else:
        pl.store(out_ref.at[split, x_rows, rows], y, mask=jnp.broadcast_to(inside, y.shape))
