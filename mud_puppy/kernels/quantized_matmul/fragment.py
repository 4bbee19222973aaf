"""The fused product for a few rows of x: each lane decodes its own operands of matrix instructions.

An instruction (m16n8k16) multiplies 2 x 8 rows of one matrix with 8 rows of another; lane 4 g + t
of a warp holds rows g and g + 8 of the first and row g of the second. Which inputs stand at which
of its 16 places is free as long as both sides agree, and so a span of 64 inputs is four
instructions, of which lane t has inputs 16 t to 16 t + 15: 8 bytes of a weight's codes and 32 of x,
as they lie in memory. Nothing is rearranged, and a span's scale is applied to its sums, in float32.

Eight rows need not be eight rows of x: with `segments` S they are 8 / S rows, S spans of each,
beside 8 / S rows of the weight and the same spans of those. Of the 8 x 8 sums the ones whose spans
agree are wanted. For a single row of x a warp so reads 256 bytes of a row of the weight at once.
The warps of a program take turns along its rows and are added at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mud_puppy.kernels import formats, target
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.quantized_matmul import decode, fragment_cuda, operands
from mud_puppy.kernels.quantized_matmul.plan import Plan

LANES = 32


def product(plan: Plan, x: Any, w: Quantized) -> Any:
    """x[M, in] @ w[out, in].T -> [M, out] in x's dtype; `plan` is for these shapes."""
    M, (N, K) = x.shape[0], w.shape
    inputs = _inputs(x, w)
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=False))
        _program(plan, w.format, jnp.dtype(x.dtype), K, named, refs[-1])

    run = pl.call(
        kernel,
        # Two axes, so that vmap can add the third.
        grid=(N // plan.rows, -(-M // plan.x_rows)),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((M, N), x.dtype),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name=f"quantized_fragment_{w.format}",
        flops=2 * M * N * K,
    )
    return run(*inputs.values())


def _inputs(x: Any, w: Quantized) -> dict[str, Any]:
    """Flat arrays, of 32-bit words where they hold smaller numbers: views, no copies.

    The weight's have a leading axis where it is one of a stack (operands.lead).
    """
    stack = w.codes.shape[: w.layer is not None]
    out = {
        "x": _words(x, ()),
        "words": _words(w.codes, stack),
        "scales": _words(w.scales, stack) if w.nested is not None else w.scales.reshape(*stack, -1),
    }
    if w.zeros is not None:
        out["zeros"] = _words(w.zeros, stack)
    return out | operands.nested_and_layer(w)


def _words(a: Any, stack: tuple[int, ...]) -> Any:
    return lax.bitcast_convert_type(a.reshape(*stack, -1, 4 // a.dtype.itemsize), jnp.int32)


def _program(plan: Plan, format: str, half: Any, K: int, refs: dict, out_ref: Any) -> None:
    M, spans = out_ref.shape[0], K // plan.span
    steps = -(-spans // (plan.num_warps * plan.spans * plan.segments))
    warp, lane = (lax.broadcasted_iota(jnp.int32, (plan.num_warps, LANES), i) for i in range(2))
    rows = _rows(plan, 0, plan.rows, lane)
    x_rows = _rows(plan, 1, plan.x_rows, lane)
    inside = [None if M % plan.x_rows == 0 else row < M for row in x_rows]
    table = decode.table(format, half, warp)
    lead = operands.lead(refs)

    def own(step: Any) -> list[Any]:
        """This lane's spans of a step."""
        first = (step * plan.num_warps + warp) * plan.spans
        return [
            (first + i) * plan.segments + (lane >> 2) % plan.segments for i in range(plan.spans)
        ]

    def weight(step: Any) -> Any:
        """Codes and scales; there are none after a row's last span."""
        return [
            [
                (
                    pl.fetch(refs["words"], (*lead, 8 * at + 2 * (lane & 3)), 2, span < spans),
                    _scale(refs, lead, at, span < spans),
                )
                for at in (row * spans + span for row in rows)
            ]
            for span in own(step)
        ]

    def of_x(span: Any) -> list[list[Any]]:
        """Eight words, 16 inputs, for each instruction's rows of x."""
        at = 32 * jnp.minimum(span, spans - 1) + 8 * (lane & 3)
        return [
            [word for i in (0, 4)
             for word in pl.fetch(refs["x"], (row * (K // 2) + at + i,), 4, valid)]
            for row, valid in zip(x_rows, inside, strict=True)
        ]  # fmt: skip

    def step(i: Any, carry: Any) -> Any:
        sums, now = carry
        ahead = weight(i + 1)
        for span, stored in zip(own(i), now, strict=True):
            xs = of_x(span)
            pairs = [
                (codes, _decoded(refs, lead, scale, row * spans + span, span < spans))
                for row, (codes, scale) in zip(rows, stored, strict=True)
            ]
            sums = [
                _add(tile, format, half, table, pairs[2 * r : 2 * r + 2], xs)
                for r, tile in enumerate(sums)
            ]
        return sums, ahead

    zero = jnp.zeros(lane.shape, jnp.float32)
    sums = [[zero] * (4 * len(x_rows)) for _ in range(len(rows) // 2)]
    sums, _ = lax.fori_loop(0, steps, step, (sums, weight(0)))
    _store(plan, [s for tile in sums for s in tile], lane, table, M, out_ref)


def _rows(plan: Plan, axis: int, size: int, lane: Any) -> list[Any]:
    """This lane's rows of a block of `size`."""
    side = 8 // plan.segments
    first = pl.program_id(axis) * size + (lane >> 2) // plan.segments
    return [first + side * i for i in range(size // side)]


def _scale(refs: dict, lead: tuple, at: Any, inside: Any) -> dict[str, Any]:
    """As it is stored at the index `at`."""

    def load(name: str, per: int) -> Any:
        return pl.fetch(refs[name], (*lead, lax.div(at, per)), 1, inside)[0]

    if "nested" in refs:
        out = {"scales": load("scales", 4), "nested": load("nested", formats.NESTED)}
    else:
        out = {"scales": load("scales", 1)}
    return out | ({"zeros": load("zeros", 4)} if "zeros" in refs else {})


def _decoded(refs: dict, lead: tuple, stored: dict, at: Any, inside: Any) -> tuple[Any, Any]:
    """(scale, zero point or None); scale 0 outside the weight."""

    def byte(word: Any) -> Any:
        return (word >> (8 * (at & 3))) & 255

    scale = stored["scales"]
    if "nested" in refs:
        code = jnp.where(inside, byte(scale), 0)
        offset = refs["offset"][lead[0] if lead else 0]
        scale = pl.load(refs["map"].at[code]) * stored["nested"] + offset
    return jnp.where(inside, scale, 0.0), byte(stored["zeros"]) if "zeros" in refs else None


def _add(
    sums: list[Any], format: str, half: Any, table: Any, pairs: list[Any], xs: list[list[Any]]
) -> list[Any]:
    """`sums` and what a span adds to them; see fragment_cuda.span."""
    codes, scale = [codes for codes, _ in pairs], [scale for _, (scale, _) in pairs]
    zero = None if pairs[0][1][1] is None else [zero for _, (_, zero) in pairs]
    if target.current().platform == "cuda":
        return fragment_cuda.span(format, half, table, codes, scale, zero, xs, sums)
    warps = sums[0].shape[0]
    parts = []
    for words, s, z in zip(codes, scale, zero or [None, None], strict=True):
        w = _values(words, format, z).reshape(warps, 8, 4, -1)
        for x in xs:
            numbers = _numbers(x, half).reshape(warps, 8, 4, -1)
            y = jnp.einsum("wgtk,wntk->wgn", w, numbers, precision="highest").reshape(
                warps, LANES, 2
            )
            parts.append([y[..., i] * s for i in range(2)])
    # From row by row of the weight to the instruction's order.
    count = len(xs)
    own = [p for i in range(count) for p in (*parts[i], *parts[count + i])]
    return [a + b for a, b in zip(sums, own, strict=True)]


def _values(words: list[Any], format: str, zero: Any) -> Any:
    """float32 [warps, 32, 16]: the numbers of two words of codes, without scale."""
    codes = jnp.stack(
        [(w >> (8 * i + j)) & 15 for w in words for i in range(4) for j in (4, 0)], -1
    )
    if format in decode.TABLES:
        return decode.look_up(codes, decode.TABLES[format])
    return codes.astype(jnp.float32) - (8 if zero is None else zero[..., None])


def _numbers(words: list[Any], half: Any) -> Any:
    """float32 [warps, 32, 16]: the numbers of eight words of x."""
    halves = jnp.stack([(w >> i).astype(jnp.int16) for w in words for i in (0, 16)], -1)
    return lax.bitcast_convert_type(halves, half).astype(jnp.float32)


def _store(plan: Plan, tiles: list[Any], lane: Any, table: Any, M: int, out_ref: Any) -> None:
    """Adds what belongs together of the sums that fragment_cuda.span describes, and writes it."""
    S = plan.segments
    side = 8 // S
    g, t = lane >> 2, lane & 3
    if S > 1:  # only the sums of x's rows with their own spans: one of a lane's pair, if any
        own = (2 * t + g % 2) % S == g % S
        tiles = [
            jnp.where(own, jnp.where(g % 2 == 1, odd, even), 0.0)
            for even, odd in zip(tiles[::2], tiles[1::2], strict=True)
        ]
    columns = 2 if S == 1 else 1
    inner = max(1, S // 2)
    # Lanes that differ in these bits have other spans of the same rows.
    bits = [b for b in (1, 2) if b < inner] + [b for b in (4, 8, 16) if b < 4 * S]
    many = plan.x_rows // side
    warp = lax.broadcasted_iota(jnp.int32, lane.shape, 0)
    for i, y in enumerate(_added(tiles, bits, table)):
        tile = (i * plan.num_warps + warp) % len(tiles)
        low, high, tile = tile % columns, tile // columns % 2, tile // (2 * columns)
        row = pl.program_id(0) * plan.rows + side * (2 * (tile // many) + high) + g // S
        x_row = pl.program_id(1) * plan.x_rows + side * (tile % many) + columns * (t // inner) + low
        # Lanes of the same numbers write the same.
        pl.store(out_ref.at[x_row, row], y.astype(out_ref.dtype), mask=x_row < M)


def _added(tiles: list[Any], bits: list[int], table: Any) -> list[Any]:
    """Sums over the W warps and over lanes that differ in `bits`.

    Warp w of the i-th tile returned has that of tile i W + w, modulo their number.
    """
    if target.current().platform == "cuda":
        return fragment_cuda.added(tiles, bits, table)
    warps = tiles[0].shape[0]
    y = jnp.stack([tile.sum(0) for tile in tiles])
    for bit in bits:
        halves = y.reshape(len(tiles), -1, 2, bit)
        y = (halves + halves[:, :, ::-1]).reshape(len(tiles), LANES)
    return list(jnp.tile(y, (-(-warps // len(tiles)), 1)).reshape(-1, warps, LANES))
