"""Flash decode as a Pallas-Triton kernel: one program a split of the sequence, key head and row.

The queries that read one key head (T new tokens x the head's group) fill one tile, padded to 16
rows, for matrix instructions; or, where the tile table gives `rows`, each program takes that many
of them without: RDNA would transpose the values through LDS two bytes at a time, and 16 rows of
which 4 are used would not fit its registers.

The blocks that a row's positions and window leave are shared out evenly among its splits, and XLA
merges the splits by their log-sum-exp, in one order always (after Flash-Decoding,
https://pytorch.org/blog/flash-decoding/). A block at the end of the cache overlaps the one before
it instead of reaching past the end.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import choice, target, tuned
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.attention.plan import pieces
from mud_puppy.kernels.attention.tile import divided

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LOW = -1e30
MAX_ROWS = 64  # of a tile of queries
MAX_HEAD = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values as the caller has them.

    k, v [B, S, K, D], under a page table [pages, page, K, D], each with a leading layer axis where
    `layer` (int32 []) is given; scales float32 of k's shape without D, for int8 codes, or None.
    page_table int32 [B, n] or None.
    """

    k: Any
    v: Any
    k_scales: Any = None
    v_scales: Any = None
    page_table: Any = None
    layer: Any = None

    @property
    def slots(self) -> int:
        """Positions that a row's cache can hold."""
        size = self.k.shape[-3]
        return size if self.page_table is None else size * self.page_table.shape[1]


@dataclass(frozen=True)
class Plan:
    block: int  # keys
    splits: int
    num_warps: int
    num_stages: int
    slots: int
    page: int | None
    window: int | None
    scale: float
    softcap: float | None
    layered: bool
    rows: int  # of queries in a program without matrix instructions; 0: a tile of all, with them


def declines(q: Any, cache: Cache) -> str | None:
    """Why the kernel cannot serve this call, or None if it can."""
    rows, page = q.shape[1] * q.shape[2] // cache.k.shape[-2], cache.k.shape[-3]
    if target.current().platform not in ("cuda", "rocm", "cpu"):
        return f"Pallas-Triton has no backend for {target.current().platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {q.dtype} is none of bfloat16, float16, float32"
    if rows > MAX_ROWS:
        return f"{rows} queries read one key head, more than {MAX_ROWS}"
    for D in (q.shape[-1], cache.v.shape[-1]):
        if D % 16 or D > MAX_HEAD:
            return f"a head of {D} is no multiple of 16 up to {MAX_HEAD}"
    if cache.page_table is not None and (page < 16 or page & (page - 1)):
        return f"pages of {page} are no power of two from 16"
    if cache.slots < 16:
        return f"a cache of {cache.slots} is shorter than a block"
    return pl.too_long(cache.k, cache.v) or choice.split_over_mesh(q, cache)


def attention(
    q: Any, cache: Cache, positions: Any, *, window: int | None, scale: float,
    softcap: float | None, sinks: Any = None, tiles: dict[str, int] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(out [B, T, H, D] in q's dtype, float32 log-sum-exp [B, T, H])."""
    B, T, H, D = q.shape
    K = cache.k.shape[-2]
    plan = _plan(q, cache, window, scale, softcap, tiles)
    used = T * H // K
    rows = max(16, 1 << (used - 1).bit_length())
    if plan.rows:
        rows = -(-used // plan.rows) * plan.rows
    tile = jnp.moveaxis(q.reshape(B, T, K, -1, D), 2, 1).reshape(B, K, used, D)
    tile = jnp.pad(tile, [(0, 0), (0, 0), (0, rows - used), (0, 0)])
    at = jnp.repeat(positions.astype(jnp.int32), H // K, axis=1)
    at = jnp.pad(at, [(0, 0), (0, rows - used)], constant_values=-1)
    sums, top, total = (x[:, :, :, :used] for x in _splits(plan, tile, cache, at))
    sink = None if sinks is None else _rows(sinks, T, K)
    out, lse = _merge(sums, top, total, sink)
    out = jnp.moveaxis(out.reshape(B, K, T, H // K, -1), 1, 2).reshape(B, T, H, -1)
    lse = jnp.moveaxis(lse.reshape(B, K, T, H // K), 1, 2).reshape(B, T, H)
    return out.astype(q.dtype), lse


def _plan(q: Any, cache: Cache, window: Any, scale: float, softcap: Any, tiles: Any) -> Plan:
    kind = "int8" if cache.k.dtype == jnp.int8 else "float32" if q.dtype == jnp.float32 else "half"
    width = next(w for w in (64, 128, 256) if w >= max(q.shape[-1], cache.v.shape[-1]))
    t = tiles or tuned.tiles("decode_attention", f"{kind} {width}")
    page = None if cache.page_table is None else cache.k.shape[-3]
    block = min(t["block"], _floor2(cache.slots), page or t["block"])
    programs = q.shape[0] * cache.k.shape[-2]
    splits = max(1, min(t["programs"] // programs, -(-cache.slots // block)))
    warps, stages = t["num_warps"], t["num_stages"]
    layered = cache.layer is not None
    return Plan(
        block, splits, warps, stages, cache.slots, page, window, scale, softcap, layered,
        t.get("rows", 0),
    )  # fmt: skip


def _splits(plan: Plan, q: Any, cache: Cache, at: Any) -> tuple[Any, Any, Any]:
    """float32 sums [B, K, splits, rows, D], and [B, K, splits, rows]: maximum (base 2), total."""
    B, K, rows, _ = q.shape
    pages = None if cache.page_table is None else cache.page_table.astype(jnp.int32)
    inputs = {
        "q": q, "k": cache.k, "v": cache.v, "at": at, "blocks": _blocks(plan, at),
        "k_scales": cache.k_scales, "v_scales": cache.v_scales, "pages": pages,
        "layer": None if cache.layer is None else jnp.reshape(cache.layer, (1,)).astype(jnp.int32),
    }  # fmt: skip
    inputs = {name: x for name, x in inputs.items() if x is not None}
    lead = (B, K, plan.splits, rows)
    shapes = (*lead, cache.v.shape[-1]), lead, lead

    def kernel(*refs: Any) -> None:
        program = _rows_program if plan.rows else _tile_program
        program(plan, dict(zip(inputs, refs, strict=False)), *refs[len(inputs) :])

    run = pl.call(
        kernel,
        grid=(plan.splits, K * (rows // plan.rows if plan.rows else 1), B),
        in_specs=[pl.BlockSpec()] * len(inputs),
        out_specs=[pl.BlockSpec()] * 3,
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        name="decode_attention",
    )
    return tuple(run(*inputs.values()))


def _blocks(plan: Plan, at: Any) -> Any:
    """int32 [B, 2]: the first block that a row's queries see, and the one after the last."""
    last = at.max(1)
    first = jnp.where(at < 0, last[:, None], at).min(1)
    first = jnp.maximum(0, first + 1 - (plan.window or plan.slots))
    end = jnp.minimum(last + 1, plan.slots)
    return jnp.stack([first // plan.block, (end + plan.block - 1) // plan.block], axis=1)


def _tile_program(plan: Plan, refs: dict, sums_ref: Any, top_ref: Any, total_ref: Any) -> None:
    s, h, b = (pl.program_id(axis) for axis in range(3))
    rows, D, Dv = refs["q"].shape[2], refs["q"].shape[3], sums_ref.shape[-1]
    at = refs["at"][b, :]
    q = [pl.load(refs["q"].at[b, h, :, pl.ds(*p)]) for p in pieces(D)]

    def step(j: Any, carry: Any) -> Any:
        sums, top, total = carry
        keys, slot, new = _block(plan, refs, b, h, j)
        k = _read(refs, "k", keys, D, refs["q"].dtype)
        x = sum(pl.dot(a, c, trans_b=True) for a, c in zip(q, k, strict=True))
        if "k_scales" in refs:
            x *= pl.load(refs["k_scales"].at[keys])[None, :]
        seen = _seen(plan, slot[None, :], at[:, None]) & new[None, :]
        x = jnp.where(seen, _logits(x, plan), 2 * LOW)
        highest = jnp.maximum(top, x.max(1))
        p = pl.exp2(x - highest[:, None])
        keep = pl.exp2(top - highest)
        total = total * keep + p.sum(1)
        if "v_scales" in refs:
            p *= pl.load(refs["v_scales"].at[keys])[None, :]
        p = p.astype(refs["q"].dtype)
        pairs = zip(sums, _read(refs, "v", keys, Dv, p.dtype), strict=True)
        return tuple(a * keep[:, None] + pl.dot(p, c) for a, c in pairs), highest, total

    start = jnp.full((rows,), LOW, jnp.float32), jnp.zeros((rows,), jnp.float32)
    zeros = tuple(jnp.zeros((rows, width), jnp.float32) for _, width in pieces(Dv))
    low, high = _share(plan, refs, b, s)
    sums, top, total = jax.lax.fori_loop(low, high, step, (zeros, *start))
    for p, tile in zip(pieces(Dv), sums, strict=True):
        pl.store(sums_ref.at[b, h, s, :, pl.ds(*p)], tile)
    top_ref[b, h, s, :] = top
    total_ref[b, h, s, :] = total


def _rows_program(plan: Plan, refs: dict, sums_ref: Any, top_ref: Any, total_ref: Any) -> None:
    """Each slot of a block has its own maximum, total and sums [block, D] until the loop is over:
    within it nothing is reduced but the products over D."""
    s, place, b = (pl.program_id(axis) for axis in range(3))
    parts = refs["q"].shape[2] // plan.rows
    h, part = divided(place, parts)
    D, Dv = refs["q"].shape[3], sums_ref.shape[-1]
    mine = [part * plan.rows + r for r in range(plan.rows)]
    at = [refs["at"][b, r] for r in mine]
    q = [[pl.load(refs["q"].at[b, h, r, pl.ds(*p)]).astype(jnp.float32) for p in pieces(D)]
         for r in mine]  # fmt: skip

    def step(j: Any, carry: Any) -> Any:
        keys, slot, new = _block(plan, refs, b, h, j)
        k = _read(refs, "k", keys, D, jnp.float32)
        v = _read(refs, "v", keys, Dv, jnp.float32)
        k_scales, v_scales = (
            pl.load(refs[n].at[keys]) if n in refs else None for n in ("k_scales", "v_scales")
        )
        after = []
        for r, (sums, top, total) in enumerate(carry):
            x = sum((c * a[None, :]).sum(1) for a, c in zip(q[r], k, strict=True))
            x = x if k_scales is None else x * k_scales
            x = jnp.where(_seen(plan, slot, at[r]) & new, _logits(x, plan), 2 * LOW)
            highest = jnp.maximum(top, x)
            p, keep = pl.exp2(x - highest), pl.exp2(top - highest)
            total = total * keep + p
            p = p if v_scales is None else p * v_scales
            pairs = zip(sums, v, strict=True)
            sums = tuple(a * keep[:, None] + p[:, None] * c for a, c in pairs)
            after.append((sums, highest, total))
        return tuple(after)

    n = plan.block
    zeros = tuple(jnp.zeros((n, width), jnp.float32) for _, width in pieces(Dv))
    start = zeros, jnp.full((n,), LOW, jnp.float32), jnp.zeros((n,), jnp.float32)
    low, high = _share(plan, refs, b, s)
    found = jax.lax.fori_loop(low, high, step, (start,) * plan.rows)
    for r, (sums, top, total) in zip(mine, found, strict=True):
        highest = top.max(0)
        factor = pl.exp2(top - highest)
        for p, tile in zip(pieces(Dv), sums, strict=True):
            pl.store(sums_ref.at[b, h, s, r, pl.ds(*p)], (tile * factor[:, None]).sum(0))
        top_ref[b, h, s, r] = highest
        total_ref[b, h, s, r] = (total * factor).sum(0)


def _share(plan: Plan, refs: dict, b: Any, s: Any) -> tuple[Any, Any]:
    """The blocks of split s of row b: [low, high)."""
    first, end = refs["blocks"][b, 0], refs["blocks"][b, 1]
    share = jax.lax.div(end - first + plan.splits - 1, plan.splits)
    low = first + s * share
    return low, jnp.minimum(low + share, end)


def _block(plan: Plan, refs: dict, b: Any, h: Any, j: Any) -> tuple[Any, Any, Any]:
    """(index of block j's keys without D, their slots [block], those that no block before had)."""
    start = jnp.minimum(j * plan.block, plan.slots - plan.block)
    row, place = _place(plan, refs, b, start)
    lead = (refs["layer"][0],) if plan.layered else ()
    slot = start + jnp.arange(plan.block, dtype=jnp.int32)
    return (*lead, row, pl.ds(place, plan.block), h), slot, slot >= j * plan.block


def _read(refs: dict, name: str, keys: Any, size: int, dtype: Any) -> list:
    """Keys or values of a block as tiles [block, width]."""
    return [pl.load(refs[name].at[(*keys, pl.ds(*p))]).astype(dtype) for p in pieces(size)]


def _seen(plan: Plan, slot: Any, at: Any) -> Any:
    seen = slot <= at
    return seen if plan.window is None else seen & (slot > at - plan.window)


def _place(plan: Plan, refs: dict, b: Any, start: Any) -> tuple[Any, Any]:
    """(row or page, offset in it) of slot `start`. A page holds whole blocks."""
    if plan.page is None:
        return b, start
    page = refs["pages"][b, jax.lax.div(start, plan.page)]
    return page, jax.lax.rem(start, plan.page)


def _logits(x: Any, plan: Plan) -> Any:
    """Scaled, capped, in base 2."""
    if plan.softcap is None:
        return x * (plan.scale * LOG2E)
    t = 1 - 2 / (1 + pl.exp2(x * (2 * LOG2E * plan.scale / plan.softcap)))  # tanh
    return t * (plan.softcap * LOG2E)


def _merge(sums: Any, top: Any, total: Any, sink: Any) -> tuple[Any, Any]:
    """(out [B, K, rows, D], log-sum-exp [B, K, rows]) from [B, K, splits, rows, ...]."""
    highest = top.max(2)
    if sink is not None:
        highest = jnp.maximum(highest, sink * LOG2E)
    factor = jnp.exp2(top - highest[:, :, None])
    whole = (total * factor).sum(2)
    if sink is not None:
        whole += jnp.exp2(sink * LOG2E - highest)
    out = (sums * factor[..., None]).sum(2) / jnp.where(whole == 0, 1, whole)[..., None]
    return out, jnp.where(whole == 0, -jnp.inf, (highest + jnp.log2(whole)) * LN2)


def _rows(sinks: Any, T: int, K: int) -> Any:
    """[H] -> float32 [1, K, T * group], as the queries lie in a tile."""
    return jnp.tile(sinks.astype(jnp.float32).reshape(1, K, 1, -1), (1, 1, T, 1)).reshape(1, K, -1)


def _floor2(n: int) -> int:
    return 1 << n.bit_length() - 1
