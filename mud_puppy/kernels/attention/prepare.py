"""What an attention kernel takes: a tile from the table, whole blocks, second layouts, ranges."""

import contextlib
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mud_puppy.kernels import tuned
from mud_puppy.kernels.attention.plan import Options, Plan, segment_ranges

PASSES = ("forward", "d_queries", "d_keys", "d_values")
KINDS = ("half", "float32")
WIDTHS = (64, 128, 192, 256)


@dataclass(frozen=True)
class Tiles:
    """One configuration a pass: q_block, k_block, num_warps, num_stages, ... of `Plan`, as items.

    Without one for d_values, d_keys's kernel gives both, with one product less but for twice the
    accumulators, which RDNA's registers do not hold.
    """

    forward: tuple
    d_queries: tuple
    d_keys: tuple
    d_values: tuple | None = None


def tuned_tiles(q: Any, v: Any, packed: bool = False) -> Tiles:
    """From the table, by dtype and width of the heads, and whether rows are packed."""
    width = next(w for w in WIDTHS if w >= max(q.shape[-1], v.shape[-1]))
    kind = KINDS[q.dtype == jnp.float32]
    found = [_tuned(f"{name} {kind} {width}", packed) for name in PASSES]
    return Tiles(*(tuple(sorted(x.items())) or None for x in found))  # pyright: ignore


def _tuned(key: str, packed: bool) -> dict[str, int]:
    """Short segments want smaller tiles than whole rows, where somebody measured it."""
    if packed:
        with contextlib.suppress(KeyError):
            return tuned.tiles("flash_attention", f"{key} packed")
    return tuned.tiles("flash_attention", key)


def plan_of(options: Options, tile: tuple, T: int, S: int) -> Plan:
    """The tile cut to short sequences: no block is twice as long as what it covers."""
    values: dict[str, Any] = dict(tile)
    for name, length in (("q_block", T), ("k_block", S)):
        values[name] = min(values[name], max(16, 1 << (length - 1).bit_length()))
    return Plan(options, T, S, **values)


def inputs_of(
    plan: Plan, q: Any, k: Any, v: Any, extra: dict, *, by_key: bool = False
) -> dict[str, Any]:
    """What all kernels take, in whole blocks."""
    t, s = -plan.T % plan.q_block, -plan.S % plan.k_block
    given = {"q": pad(q, 1, t), "k": pad(k, 1, s), "v": pad(v, 1, s)}
    if extra["bias"] is not None:
        given["bias"] = pad(pad(extra["bias"], 2, t), 3, s)
    if plan.options.dropout:
        given["seed"] = extra["seed"].reshape(1)
    if extra["q_ids"] is not None:
        ways = [(extra["q_ids"], extra["k_ids"])]
        ways += [] if extra["prefixes"] is None else [extra["prefixes"]]
        found = [_of_way(plan, *ids, t, s, by_key) for ids in ways]
        given |= {name: jnp.stack([way[name] for way in found]) for name in found[0]}
    return given


def _of_way(plan: Plan, q_ids: Any, k_ids: Any, t: int, s: int, by_key: bool) -> dict[str, Any]:
    """The ids by which queries see keys, in whole blocks, and which of these meet."""
    q_ids, k_ids = (
        jnp.pad(x.astype(jnp.int32), ((0, 0), (0, n)), mode="edge")
        for x, n in ((q_ids, t), (k_ids, s))
    )
    found = segment_ranges(plan, q_ids, k_ids, by_key=by_key)
    return {"q_ids": q_ids, "k_ids": k_ids} | found


def layouts(
    plan: Plan, given: dict, *, transposed: tuple = (), streamed: tuple = ()
) -> dict[str, Any]:
    """given, and what plan.transposed and plan.chunk ask for beside it."""
    given = dict(given)
    for name in transposed if plan.transposed else ():
        given[f"{name}_t"] = _transposed(given[name])
    for name in streamed:
        width = given[name].shape[-1]
        if (turns := width // plan.columns(width)) > 1:
            given[f"{name}_chunks"] = jnp.full(1, turns, jnp.int32)
    return given


def pad(x: Any, axis: int, amount: int) -> Any:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return jnp.pad(x, widths) if amount else x


def _transposed(x: Any) -> Any:
    """[B, T, H, D] -> [B, H, D, T]: RDNA's matrix instructions read runs along what they sum."""
    return x.transpose(0, 2, 3, 1)
