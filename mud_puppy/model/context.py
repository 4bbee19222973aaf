"""What layers read: a batch's positions, segments and rotary tables; and the cache they write."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch
from mud_puppy.model.rope import rope_tables

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """tokens, positions, segment_ids int32 [B, T] (segment 0 is padding, None: all one example).

    positions count from 0 in each example. prefix_ids int32 [B, T]: n > 0 on the tokens of prefix
    n, -n on the tokens of segments that see it beside themselves, 0 elsewhere. A prefix is the
    start of a segment, stands before all that see it, and their positions go on from its own. None:
    no segment sees another (`check_prefix`: which models can). `embeds` [N, D] replaces the
    embedding of token (b, t) by row `embed_index[b, t]` where that is >= 0 (images).
    """

    tokens: Any
    positions: Any = None
    segment_ids: Any = None
    embeds: Any = None
    embed_index: Any = None
    prefix_ids: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [L, B, S, K, hd]; slot s holds the token at position s.

    Values narrower than keys (latent attention) end in zeros.
    """

    k: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer reads and none changes. ropes: (cos, sin) of each of `Arch.ropes`. tile: see
    `tile.over_tiles`."""

    arch: Arch = field(metadata={"static": True})
    positions: Any
    segment_ids: Any
    prefix_ids: Any
    ropes: Any
    tile: int | None = field(default=None, metadata={"static": True})


def make_context(arch: Arch, inputs: Inputs, tile: int | None = None) -> Context:
    positions = inputs.positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape)
    if inputs.prefix_ids is not None:
        if inputs.segment_ids is None or inputs.positions is None:
            raise ValueError("prefix_ids need positions and segment_ids beside them")
        check_prefix(arch, inputs.tokens.shape[1])
    ropes = tuple(rope_tables(rope, positions, inputs.segment_ids) for rope in arch.ropes)
    return Context(arch, positions, inputs.segment_ids, inputs.prefix_ids, ropes, tile)


def check_prefix(arch: Arch, length: int) -> None:
    """UserError for a model that cannot share prefixes in rows of `length` tokens.

    A window counts positions, kernels count places in the row, which differ between a prefix and
    what sees it. Two kinds of rope turn a key by the length of its sequence, and the sequences of a
    prefix differ in length.
    """
    windows = [kind.window for kind in arch.kinds if kind.window is not None]
    limits = [rope.long[1] for rope in arch.ropes if rope.long is not None]
    limits += [rope.dynamic[2] for rope in arch.ropes if rope.dynamic is not None]
    for name, least in (
        ("see {} tokens back (a sliding window)", min(windows, default=length)),
        ("have a RoPE that changes beyond {} tokens", min(limits, default=length)),
    ):
        if least < length:
            raise UserError(
                f"shared_prefix: layers of this model ({arch.family}) {name.format(least)}, but "
                f"rows have {length}: they cannot share a prompt; leave out shared_prefix, or set "
                f"max_seq_length to at most {least // 2}, so that a row has no more than {least}"
            )


def make_cache(arch: Arch, batch: int, slots: int, dtype: Any) -> Cache:
    shape = (arch.layers, batch, slots, arch.kv_heads, arch.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: Cache, layer: Array, positions: Array, k: Array, v: Array) -> Cache:
    """The cache with the keys and values of new tokens in their slots of one layer."""
    rows = jnp.arange(k.shape[0])[:, None]
    if narrow := k.shape[-1] - v.shape[-1]:
        v = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, narrow)])
    return Cache(
        cache.k.at[layer, rows, positions].set(k.astype(cache.k.dtype)),
        cache.v.at[layer, rows, positions].set(v.astype(cache.v.dtype)),
    )
