"""Which tiles the fused kernel takes for a call, or why it cannot serve it."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mud_puppy.kernels import formats, tuned
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.quantized_matmul import decode

OP = "quantized_matmul"
WIDE = 8192  # rows of a weight from which on programs of many rows still fill the chip
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
    kernel: str = "tile"  # or "vector", or "fragment": the module that runs it
    segments: int = 1  # of a row at once, in the kernel `fragment`


def plan(x: Any, w: Quantized, tiles: dict[str, int] | None = None) -> Plan | str:
    """The plan for x[M, in] and w[out, in], or the reason why there is none.

    `tiles` stands in the place of the table's entry, where tiles are being chosen.
    """
    M, K = x.shape
    N = w.shape[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {jnp.dtype(x.dtype).name}, not bfloat16 or float16"
    if x.dtype == jnp.float16 and w.format == "fp8_e5m2fnuz":
        return "float16 does not hold every fp8_e5m2fnuz"
    if not M:
        return "x has no rows"
    if N % 16:
        return f"{N} rows have no tile of 16 or more"
    offsets = w.zeros is not None or w.minimum is not None
    if offsets and w.format != "int4":
        return f"{w.format} with zero points"
    row_scales = w.scales.shape[-1] == 1 and not offsets and w.format not in formats.PACKED
    span = min(SPAN, (K & -K) if row_scales else (w.group & -w.group))
    if span // decode.per_word(w.format) < 8:
        return f"groups of {w.group} are too short"
    shape = Shape(M, N, K // span, span, 1 if row_scales else w.group // span, row_scales)
    if (found := _fragment(shape, w)) is not None:
        return found
    if M == 1 and w.format in formats.PACKED and not offsets and shape.per_group == 1:
        found = _vector(shape, tiles or tuned.tiles(OP, f"{kind(w.format)} 1"))
        if found is not None:
            return found
    return _matrix(shape, tiles or tuned.tiles(OP, f"{kind(w.format)} {_bucket(M)}"), w)


@dataclass(frozen=True)
class Shape:
    M: int  # rows of x
    N: int  # rows of the weight
    total: int  # spans of a row
    span: int
    per_group: int
    row_scales: bool


def _fragment(shape: Shape, w: Quantized) -> Plan | None:
    """For a few rows of x; None where the chip has no such kernel, or it is for other weights."""
    served = w.format in ("nf4", "int4") and w.group == 64 and w.minimum is None
    if not served or (w.nested is None and w.scales.dtype != jnp.float32):
        return None
    few = 1 << (shape.M - 1).bit_length()
    key = f"{kind(w.format)} fragment {few} {'wide' if shape.N >= WIDE else 'narrow'}"
    try:
        tiles = tuned.tiles(OP, key)
    except KeyError:
        return None
    rows = min(tiles["rows"], shape.N & -shape.N)
    return Plan(
        rows, tiles["x_rows"], shape.span, tiles["spans"], 1, False, 1,
        tiles["num_warps"], 1, "fragment", tiles["segments"],
    )  # fmt: skip


def _vector(shape: Shape, tiles: dict[str, int]) -> Plan | None:
    """For a single row of x; None where a row of the weight has no step of a useful size."""
    rows = min(tiles["rows"], shape.N & -shape.N)
    spans = min(tiles["columns"] // shape.span, shape.total & -shape.total)
    if shape.span * spans < 128:
        return None
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    return Plan(rows, 1, shape.span, spans, 1, False, 1, warps, stages, kernel="vector")


def _matrix(shape: Shape, tiles: dict[str, int], w: Quantized) -> Plan | str:
    rows = min(tiles["rows"], shape.N & -shape.N)
    # A step holds spans of one group, or whole groups; in either case a power of two of them.
    whole = shape.per_group if shape.per_group > 1 else shape.total
    spans = min(tiles["columns"] // shape.span, whole & -whole)
    if spans * shape.span // decode.per_word(w.format) < 16:
        return f"rows of {w.shape[1]} in groups of {w.group} have no tile of 16 words"
    x_rows = min(tiles["x_rows"], max(16, 1 << (shape.M - 1).bit_length()))
    programs = shape.N // rows * -(-shape.M // x_rows)
    splits = _splits(shape.total // spans, tiles["programs"] / programs)
    return Plan(
        rows, x_rows, shape.span, spans, shape.per_group, shape.row_scales, splits,
        tiles["num_warps"], tiles["num_stages"],
    )  # fmt: skip


def crossover() -> int:
    """Rows of x up to which the fused kernel is faster than decoding first."""
    return tuned.tiles(OP, "crossover")["rows"]


def kind(format: str) -> str:
    """The name under which the table keeps formats that decode alike."""
    return format.split("_")[0]


def _bucket(M: int) -> int:
    """16, 32, 64 or 128: the table's numbers of rows."""
    return min(128, max(16, 1 << (M - 1).bit_length()))


def _splits(steps: int, wanted: float) -> int:
    """The smallest divisor of `steps` that gives at least `wanted` parts, if there is one."""
    fitting = [d for d in range(1, steps + 1) if steps % d == 0 and d >= wanted]
    return fitting[0] if fitting else steps
