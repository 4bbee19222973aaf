"""The fused product for one row of x, on the vector units: matrix instructions want sixteen.

One program makes some elements of the result from whole rows of the weight. Each group's products
are summed before its scale is applied, so that a weight costs its decoding and one multiply-add,
all in float32.
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
    """x[1, in] @ w[out, in].T -> [1, out] in x's dtype; `plan` is for these shapes."""
    N = w.shape[0]
    inputs = operands.inputs(plan, x, w)
    # Two numbers of x in one int32: a view, where planes would take a kernel of their own.
    spans = inputs["words"].shape[-2]
    inputs["x"] = lax.bitcast_convert_type(x.reshape(spans, -1, 2), jnp.int32)
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        _program(plan, w.format, x.dtype, dict(zip(names, refs, strict=False)), refs[-1])

    run = pl.call(
        kernel,
        grid=(N // plan.rows,),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((1, N), x.dtype),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name=f"quantized_vector_{w.format}",
        flops=2 * math.prod(w.shape),
    )
    return run(*inputs.values())


def _program(plan: Plan, format: str, dtype: Any, refs: dict, out_ref: Any) -> None:
    words_ref = refs["words"]
    spans, size = words_ref.shape[-2:]
    lead = operands.lead(refs)
    row = pl.program_id(0)
    rows = pl.ds(row * plan.rows, plan.rows)

    def step(i: Any, sums: Any) -> Any:
        first = i * plan.spans
        own = pl.ds(first, plan.spans)
        words = pl.load(words_ref.at[(*lead, rows, own, slice(None))])
        scales, _, _ = operands.scales(plan, refs, lead, row, first)
        values = decode.floats(words, format)
        xs = _elements(refs["x"], first, (plan.spans, size), dtype)
        total = values[0] * xs[0][None]
        for value, x in zip(values[1:], xs[1:], strict=True):
            total = pl.fma(value, x[None], total)
        scales = jnp.broadcast_to(scales, (*scales.shape[:2], 1)).reshape(plan.rows, -1)
        return pl.fma(total.sum(2), scales, sums)

    sums = lax.fori_loop(
        0, spans // plan.spans, step, jnp.zeros((plan.rows, plan.spans), jnp.float32)
    )
    pl.store(out_ref.at[pl.ds(0, 1), rows], sums.sum(1)[None, :].astype(out_ref.dtype))


def _elements(x_ref: Any, first: Any, shape: tuple[int, ...], dtype: Any) -> list[Any]:
    """Elements 0 to 3 of each word of the spans from `first`: float32 [spans, words of a span]."""
    span = first + jnp.arange(shape[0], dtype=jnp.int32)[:, None]
    word = jnp.arange(shape[1], dtype=jnp.int32)[None, :]
    out = []
    for i in range(2):
        pairs = pl.load(
            x_ref.at[jnp.broadcast_to(span, shape), jnp.broadcast_to(2 * word + i, shape)]
        )
        for half in (pairs, pairs >> 16):
            number = lax.bitcast_convert_type(half.astype(jnp.int16), dtype)
            out.append(number.astype(jnp.float32))
    return out
