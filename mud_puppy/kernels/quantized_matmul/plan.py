"""Which tiles the fused kernel takes for a call, or why it cannot serve it."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mud_puppy.kernels import formats, tuned
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.quantized_matmul import decode

OP = "quantized_matmul"
SPAN = 128  # the most elements that are decoded with one scale at a time


@dataclass(frozen=True)
class Plan:
    """Tiles of one call. A span is a group of inputs, or a part of a group that is larger."""

    rows: int  # of the weight in a program
    x_rows: int  # of x in a program
    span: int  # elements
    spans: int  # in a step of the loop
    spans_per_group: int
    row_scales: bool  # a scale for a whole row, applied to the sums
    splits: int  # of a row over programs
    num_warps: int
    num_stages: int
    vector: bool = False  # on the vector units, for a single row of x


def plan(x: Any, w: Quantized) -> Plan | str:
    """The plan for x[M, in] and w[out, in], or the reason why there is none."""
    M, K = x.shape
    N = w.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(x.dtype).name}, not bfloat16 or float16"
    if x.dtype == jnp.float16 and w.format == "fp8_e5m2fnuz":
        return "float16 does not hold every fp8_e5m2fnuz"
    group = w.group
    row_scales = w.scales.shape[-1] == 1 and w.zeros is None and w.minimum is None
    row_scales = row_scales and w.format not in formats.PACKED
    span = min(SPAN, (K & -K) if row_scales else (group & -group))
    words = span // decode.per_word(w.format)
    if words < 8:
        return f"groups of {group} are too short"
    tiles = tuned.tiles(OP, f"{kind(w.format)} {_bucket(M)}")
    rows = min(tiles["rows"], N & -N)
    if rows < 16:
        return f"{N} rows have no tile of 16 or more"
    total = K // span
    per_group = 1 if row_scales else group // span
    if M == 1 and w.format in formats.PACKED and w.zeros is None and w.minimum is None:
        vector = _vector(N, span, total, per_group, w.format)
        if vector is not None:
            return vector
    most = max(1, min(tiles["columns"] // span, per_group if per_group > 1 else total))
    spans = math.gcd(1 << (most.bit_length() - 1), per_group if per_group > 1 else total)
    if spans * words < 16:
        return f"rows of {K} elements in groups of {group} have no tile of 16 words"
    x_rows = min(tiles["x_rows"], max(16, 1 << (M - 1).bit_length()))
    programs = N // rows * -(-M // x_rows)
    splits = _splits(total // spans, tiles["programs"] / programs)
    return Plan(
        rows, x_rows, span, spans, per_group, row_scales, splits,
        tiles["num_warps"], tiles["num_stages"],
    )  # fmt: skip


def _vector(N: int, span: int, total: int, per_group: int, format: str) -> Plan | None:
    """The plan for a single row of x, where the weight has a 4-bit format without zero points."""
    tiles = tuned.tiles(OP, f"{kind(format)} 1")
    rows, spans = min(tiles["rows"], N & -N), min(tiles["columns"] // span, total & -total)
    if per_group > 1 or span * spans < 128:
        return None
    return Plan(
        rows, 1, span, spans, 1, False, 1, tiles["num_warps"], tiles["num_stages"], vector=True
    )  # fmt: skip


def crossover() -> int:
    """Rows of x up to which the fused kernel is faster than decoding first."""
    return tuned.tiles(OP, "crossover")["rows"]


def kind(format: str) -> str:
    """The name under which the table keeps formats that decode alike."""
    return {"nf4": "table", "mxfp4": "table"}.get(format, format.split("_")[0])


def _bucket(M: int) -> int:
    """16, 32, 64 or 128: the table's numbers of rows."""
    return min(128, max(16, 1 << (M - 1).bit_length()))


def _splits(steps: int, wanted: float) -> int:
    """The smallest divisor of `steps` that gives at least `wanted` parts, if there is one."""
    fitting = [d for d in range(1, steps + 1) if steps % d == 0 and d >= wanted]
    return fitting[0] if fitting else steps
