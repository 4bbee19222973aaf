"""What the kernels read: x in planes, codes in 16-bit words, and the scales of a step."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from mud_puppy.kernels import formats
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.quantized_matmul import decode
from mud_puppy.kernels.quantized_matmul.plan import Plan


def inputs(plan: Plan, x: Any, w: Quantized) -> dict[str, Any]:
    """x [elements of a word * M, words], words [out, spans, words of a span], and the scales.

    The words are a view of the codes; x is rearranged, which XLA fuses with what made it. What is
    the weight's has a leading axis where the weight is one of a stack (`lead`).
    """
    M, K = x.shape
    n = decode.per_word(w.format)
    *stack, N, size = w.codes.shape
    words = lax.bitcast_convert_type(w.codes.reshape(*stack, N, size // 2, 2), jnp.int16)
    out = {
        "x": decode.order(x, w.format),
        "words": words.reshape(*stack, N, K // plan.span, plan.span // n),
        "scales": w.scales,
    }
    if w.scales.shape[-2] == 1 < N:
        out["scales"] = jnp.broadcast_to(w.scales, (*stack, N, w.scales.shape[-1]))
    offsets = (("zeros", w.zeros), ("minimum", w.minimum))
    return out | nested_and_layer(w) | {k: v for k, v in offsets if v is not None}


def nested_and_layer(w: Quantized) -> dict[str, Any]:
    """What decodes doubly quantized scales, and the number of a stack's layer, where w has them."""
    out = {}
    if w.nested is not None:
        table = jnp.asarray(formats.dynamic_map())
        out |= {"nested": w.nested, "offset": w.offset.reshape(-1), "map": table}
    if w.layer is not None:
        out["layer"] = w.layer.astype(jnp.int32).reshape(1)
    return out


def lead(refs: dict) -> tuple:
    """What stands before the other indices of the weight's arrays: the layer, in a stack."""
    return (refs["layer"][0],) if "layer" in refs else ()


def scales(plan: Plan, refs: dict, at: tuple, row: Any, first: Any) -> tuple[Any, Any, Any]:
    """scales, zeros, minimum of the spans from `first`, float32 [rows, spans, 1], or None.

    `at` is the weight's `lead`, `row` counts blocks of plan.rows. All are None where the scales
    are applied to the sums.
    """
    if plan.row_scales:
        return None, None, None
    rows = pl.ds(row * plan.rows, plan.rows)

    def load(name: str) -> Any:
        if name not in refs:
            return None
        if plan.spans_per_group == 1:
            tile = pl.load(refs[name].at[(*at, rows, pl.ds(first, plan.spans))])
        else:  # all spans of a step are of one group
            group = lax.div(first, plan.spans_per_group)
            tile = pl.load(refs[name].at[(*at, rows, pl.ds(group, 1))])
        return tile[:, :, None]

    scales, zeros, minimum = load("scales"), load("zeros"), load("minimum")
    if "nested" in refs:
        groups = refs["scales"].shape[-1]
        index = row * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)[:, None]
        group = lax.div(first, plan.spans_per_group)
        index = index * groups + group + jnp.arange(scales.shape[1], dtype=jnp.int32)[None, :]
        absmax = pl.load(refs["nested"].at[(*at, lax.div(index, formats.NESTED))])[:, :, None]
        value = pl.load(refs["map"].at[scales.astype(jnp.int32)])
        scales = value * absmax + refs["offset"][at[0] if at else 0]
    elif refs["scales"].dtype == jnp.uint8:  # mxfp4's exponents
        scales = lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    zeros, minimum = (t if t is None else t.astype(jnp.float32) for t in (zeros, minimum))
    return scales.astype(jnp.float32), zeros, minimum
