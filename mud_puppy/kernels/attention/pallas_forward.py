"""FlashAttention's forward pass as a Pallas-Triton kernel: one program a query block and head.

Online softmax (arXiv:2205.14135) in base 2. The output's rows are divided by their sums at the end
(arXiv:2307.08691). Arrays are padded to whole blocks and heads to multiples of 16 by the caller.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.attention import tile
from mud_puppy.kernels.attention.plan import Plan
from mud_puppy.kernels.attention.tile import LOG2E, LOWEST, Hidden, Tile


def forward(plan: Plan, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(out [B, T, H, Dv] in q's dtype, natural log-sum-exp float32 [B, H, T]); T is padded.

    inputs: q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] or, if plan.transposed, v_t [B, K, Dv,
    S]; if plan.chunk divides D, q_chunks [1] int32, D / chunk;
    and where the call has them sinks [H], bias [B|1, H|1, T, S], seed [1] uint32 and, for each way
    in which ids let a query see a key, q_ids [W, B, T], k_ids [W, B, S] and plan.SEGMENTS [W, B,
    q_blocks].
    """
    q = inputs["q"]
    B, T, H, D = q.shape
    Dv = inputs["v_t"].shape[2] if plan.transposed else inputs["v"].shape[3]
    names = tuple(inputs)

    def kernel(*refs: Any) -> None:
        _program(plan, dict(zip(names, refs, strict=False)), *refs[len(names) :])

    run = pl.call(
        kernel,
        grid=(H, B, plan.q_blocks) if plan.heads_first else (plan.q_blocks, H, B),
        in_specs=[pl.BlockSpec()] * len(names),
        out_specs=[pl.BlockSpec()] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H, Dv), q.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name="attention_forward",
        flops=2 * (D + Dv) * B * H * plan.pairs,
    )
    return tuple(run(*inputs.values()))


def _program(plan: Plan, refs: dict, out_ref: Any, lse_ref: Any) -> None:
    b, h, i = place(plan)
    rows, kv_head = plan.q_block, tile.kv_head(refs, h)
    start = i * rows
    own = tile.Operand(plan, refs, b, start, rows, h, keep=("q",))

    def step(scores: Tile, j: Any, carry: Any, hidden: Hidden) -> Any:
        sums, top, total = carry
        other = tile.Operand(plan, refs, b, j * plan.k_block, plan.k_block, kv_head)
        block = scores.block(i, j, hidden)
        x, _ = block.scores(own.products("q", other, "k"))
        new_top = jnp.maximum(top, x.max(1) * scores.factor)
        p = tile.power(x, scores.factor, new_top[:, None])
        keep = pl.exp2(top - new_top)
        total = total * keep + p.sum(1)
        if plan.options.dropout:
            p = jnp.where(block.kept(), p, 0)
        sums = tuple(x * keep[:, None] for x in sums)
        return tile.accumulate(sums, p, other.summed("v"), plan.transposed), new_top, total

    def visit(way: Any, carry: Any) -> Any:
        scores = Tile(plan, refs, way, b, h, i=i)
        bounds = tile.ranges(plan, refs, way, b, i)
        return tile.over(plan, bounds, partial(step, scores), carry)

    Dv = out_ref.shape[-1]
    top, total = jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32)
    carry = tile.zeros(rows, Dv), top, total
    sums, top, total = tile.each_way(refs, visit, carry)
    if "sinks" in refs:
        sink = refs["sinks"][h] * LOG2E
        new_top = jnp.maximum(top, sink)
        keep = pl.exp2(top - new_top)
        sums = tuple(x * keep[:, None] for x in sums)
        top, total = new_top, total * keep + pl.exp2(sink - new_top)
    divisor = jnp.where(total == 0, 1.0, total)
    scale = 1 / (divisor * (1 - plan.options.dropout))
    tile.write(out_ref, b, start, rows, h, tuple(x * scale[:, None] for x in sums))
    lse = jnp.where(total == 0, -jnp.inf, top * (1 / LOG2E) + jnp.log(divisor))
    pl.store(lse_ref.at[b, h, pl.ds(start, rows)], lse)


def place(plan: Plan) -> tuple[Any, Any, Any]:
    """(b, h, query block) of this program; under a causal mask the longest rows start first."""
    if plan.heads_first:
        h, b, i = (pl.program_id(axis) for axis in range(3))
    else:
        i, h, b = (pl.program_id(axis) for axis in range(3))
    return b, h, plan.q_blocks - 1 - i if plan.options.causal else i
