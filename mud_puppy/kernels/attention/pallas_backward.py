"""FlashAttention's backward pass as Pallas-Triton kernels without atomics: the same bits each run.

With p = 2^(factor x - lse) and row = sum(d_out * out) - d_lse, d scores = p * (d p - row). One
kernel sums d_k and d_v of a key block over all queries of the heads that share it, one sums d_q of
a query block over its keys; each makes the scores again. d_k's works on transposed tiles [keys,
queries], so that p^T and d scores^T leave one product in the layout that the next one takes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.attention import tile
from mud_puppy.kernels.attention.pallas_forward import place
from mud_puppy.kernels.attention.plan import Plan
from mud_puppy.kernels.attention.tile import Block, Hidden, Tile


def d_queries(plan: Plan, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(d_q [B, T, H, D] in q's dtype, row float32 [B, H, T], which the other passes take).

    inputs: those of the forward but for sinks (v always [B, S, K, Dv]); out and d_out [B, T, H,
    Dv]; lse (base 2, finite) and d_lse, float32 [B, H, T]; if plan.transposed, k_t [B, K, D, S];
    if plan.chunk divides them, q_chunks and d_out_chunks.
    """
    q = inputs["q"]
    B, T, H, D = q.shape
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        _queries_program(plan, dict(zip(names, refs, strict=False)), *refs[len(names) :])

    run = pl.call(
        kernel,
        grid=(H, B, plan.q_blocks) if plan.heads_first else (plan.q_blocks, H, B),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=[pl.BlockSpec()] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H, D), q.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name="attention_d_queries",
        flops=2 * (2 * D + inputs["v"].shape[3]) * B * H * plan.pairs,
    )
    return tuple(run(*inputs.values()))


def _queries_program(plan: Plan, refs: dict, dq_ref: Any, row_ref: Any) -> None:
    b, h, i = place(plan)
    rows, kv_head = plan.q_block, tile.kv_head(refs, h)
    start = i * rows
    columns = min(plan.row_columns, (width := refs["out"].shape[-1]) & -width)
    row = _row_by_columns(refs, b, h, start, rows, columns) if columns else None
    own = tile.Operand(plan, refs, b, start, rows, h, keep=("q", "d_out"))
    at = b, h, pl.ds(start, rows)
    lse = pl.load(refs["lse"].at[at])
    if row is None:
        row = -pl.load(refs["d_lse"].at[at])
        for x, y in zip(own.read("d_out"), own.read("out"), strict=True):
            row += (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(1)
    pl.store(row_ref.at[at], row)

    def step(scores: Tile, j: Any, sums: tuple, hidden: Hidden) -> tuple:
        other = tile.Operand(plan, refs, b, j * plan.k_block, plan.k_block, kv_head)
        block = scores.block(i, j, hidden)
        products = own.products("q", other, "k"), own.products("d_out", other, "v")
        d_x = _d_scores(block, *products, lse, row)[1]
        return tile.accumulate(sums, d_x, other.summed("k"), plan.transposed)

    def visit(way: Any, sums: tuple) -> tuple:
        scores = Tile(plan, refs, way, b, h, i=i)
        return tile.over(plan, tile.ranges(plan, refs, way, b, i), partial(step, scores), sums)

    D = dq_ref.shape[-1]
    sums = tile.each_way(refs, visit, tile.zeros(rows, D))
    tile.write(dq_ref, b, start, rows, h, tuple(x * plan.options.scale for x in sums))


def _row_by_columns(refs: dict, b: Any, h: Any, start: Any, size: int, columns: int) -> Any:
    """sum(d_out * out) - d_lse, [size]. Both heads whole can take more registers than all that
    follows, and then fewer programs share a multiprocessor."""
    rows = pl.ds(start, size)

    def part(c: Any, row: Any) -> Any:
        at = b, rows, h, pl.ds(c * columns, columns)
        x, y = (pl.load(refs[name].at[at]).astype(jnp.float32) for name in ("d_out", "out"))
        return row + (x * y).sum(1)

    turns = refs["out"].shape[-1] // columns
    return jax.lax.fori_loop(0, turns, part, -pl.load(refs["d_lse"].at[b, h, rows]))


def d_keys_values(
    plan: Plan, inputs: dict[str, Any], wanted: tuple[str, ...] = ("k", "v")
) -> tuple[Any, ...]:
    """(d_k, d_v) like k and v, or the one that is wanted.

    inputs: as for `d_queries` with row for out and d_lse, and plan.SEGMENTS [B, k_blocks]; if
    plan.transposed, q_t [B, H, D, T] and d_out_t [B, H, Dv, T] for k_t; if plan.chunk divides them,
    k_chunks and v_chunks.
    """
    B, _, K, D = inputs["k"].shape
    _, _, H, Dv = inputs["d_out"].shape
    # Scores, then d_out @ v.T for dk alone, then the products with queries and d_out.
    width = D + (D + Dv) * ("k" in wanted) + Dv * ("v" in wanted)
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        outputs = dict(zip(wanted, refs[len(names) :], strict=True))
        _keys_program(plan, dict(zip(names, refs, strict=False)), outputs)

    run = pl.call(
        kernel,
        grid=(K, B, plan.k_blocks) if plan.heads_first else (plan.k_blocks, K, B),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=[pl.BlockSpec()] * len(wanted),
        out_shape=[jax.ShapeDtypeStruct(inputs[x].shape, inputs[x].dtype) for x in wanted],
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name="attention_d_keys_values" if len(wanted) == 2 else f"attention_d_{wanted[0]}",
        flops=2 * width * B * H * plan.pairs,
    )
    return tuple(run(*inputs.values()))


def _keys_program(plan: Plan, refs: dict, outputs: dict) -> None:
    axes = (1, 0, 2) if plan.heads_first else (2, 1, 0)
    b, kv_head, j = (pl.program_id(axis) for axis in axes)  # a causal mask's first keys see most
    rows, group = plan.k_block, refs["q"].shape[2] // refs["k"].shape[2]
    keep = ("k", "v") if "k" in outputs else ("k",)
    own = tile.Operand(plan, refs, b, j * rows, rows, kv_head, keep=keep)

    def step(first: Tile, n: Any, sums: dict, hidden: Hidden) -> dict:
        i, g = tile.divided(n, group)
        scores = first.of_head(g)
        sums, at = dict(sums), (b, i * plan.q_block, plan.q_block, scores.h)
        other = tile.Operand(plan, refs, *at)
        at = b, scores.h, pl.ds(*at[1:3])
        lse, row = (pl.load(refs[name].at[at]) for name in ("lse", "row"))
        block = scores.block(i, j, hidden)
        products = own.products("k", other, "q")
        d_p = own.products("v", other, "d_out") if "k" in sums else None
        p, d_x = _d_scores(block, products, d_p, lse, row)
        for name, weights, source in (("v", p, "d_out"), ("k", d_x, "q")):
            if name in sums:
                tiles = other.summed(source)
                sums[name] = tile.accumulate(sums[name], weights, tiles, plan.transposed)
        return sums

    def visit(way: Any, sums: dict) -> dict:
        first = Tile(plan, refs, way, b, kv_head * group, j=j)
        # One loop over the heads of the group within each block: a loop a head would start a
        # pipeline a head, and neighbouring heads are neighbours in memory.
        bounds = tile.times(tile.ranges(plan, refs, way, b, j, by_key=True), group)
        return tile.over(plan, bounds, partial(step, first), sums)

    sums = {name: tile.zeros(rows, ref.shape[-1]) for name, ref in outputs.items()}
    sums = tile.each_way(refs, visit, sums)
    scales = {"k": plan.options.scale, "v": 1 / (1 - plan.options.dropout)}
    for name, ref in outputs.items():
        tile.write(ref, b, j * rows, rows, kv_head, tuple(x * scales[name] for x in sums[name]))


def d_bias(plan: Plan, inputs: dict[str, Any]) -> Any:
    """d bias [B|1, H|1, T, S] in bias's dtype, summed over what it was broadcast to.

    inputs: as for `d_queries` with row for out and d_lse, and nothing transposed.
    """
    bias = inputs["bias"]
    B, _, H, _ = inputs["q"].shape
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        _bias_program(plan, dict(zip(names, refs, strict=False)), refs[-1])

    run = pl.call(
        kernel,
        grid=(plan.k_blocks, plan.q_blocks, bias.shape[0] * bias.shape[1]),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct(bias.shape, bias.dtype),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name="attention_d_bias",
    )
    return run(*inputs.values())


def _bias_program(plan: Plan, refs: dict, out_ref: Any) -> None:
    j, i, n = (pl.program_id(axis) for axis in range(3))
    B, _, H, _ = refs["q"].shape
    own_b, own_h = out_ref.shape[:2]
    b0, h0 = tile.divided(n, own_h)
    b_members, h_members = B // own_b, H // own_h
    start = i * plan.q_block
    rows = pl.ds(start, plan.q_block)

    def member(m: Any, total: Any) -> Any:
        b1, h1 = tile.divided(m, h_members)
        b, h = b0 + b1, h0 + h1
        q, d_out = (tile.heads(refs[x], b, start, plan.q_block, h) for x in ("q", "d_out"))
        at = b, j * plan.k_block, plan.k_block, tile.kv_head(refs, h)
        k, v = tile.heads(refs["k"], *at), tile.heads(refs["v"], *at)
        lse, row = (pl.load(refs[name].at[b, h, rows]) for name in ("lse", "row"))
        block = Tile(plan, refs, 0, b, h, i=i).block(i, j, Hidden(True, "q_ids" in refs))
        products = tile.products(q, k), tile.products(d_out, v)
        return total + _d_scores(block, *products, lse, row, capped=True)[1]

    zero = jnp.zeros((plan.q_block, plan.k_block), jnp.float32)
    total = jax.lax.fori_loop(0, b_members * h_members, member, zero)
    target = out_ref.at[b0, h0, rows, pl.ds(j * plan.k_block, plan.k_block)]
    pl.store(target, total.astype(out_ref.dtype))


def _d_scores(
    block: Block, products: Any, d_p: Any, lse: Any, row: Any, *, capped: bool = False
) -> tuple[Any, Any]:
    """(weights after dropout but for its 1 / (1 - rate), d scores but for scale if d_p is given).

    `capped`: of the scores after softcap, where bias is added.
    """
    x, slope = block.scores(products)
    p = tile.power(x, block.tile.factor, block.tile.along_queries(lse))
    weights, rate = p, block.tile.plan.options.dropout
    if rate:
        kept = block.kept()
        weights = jnp.where(kept, p, 0)
    if d_p is None:
        return weights, None
    if rate:
        d_p = jnp.where(kept, d_p * (1 / (1 - rate)), 0)
    d_x = p * (d_p - block.tile.along_queries(row))
    return weights, d_x if capped or slope is None else d_x * slope
