"""The one decoder: embedding, blocks of attention and MLP, final norm, as functions of params.

What differs between families is in `Arch` and in which leaves are present (a bias, a q_norm, an
untied head); nothing here asks for a family's name. How layers are run is injected (`scan_layers`
here; streaming and pipelined runners come from `parallel/`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mud_puppy.kernels import decode_attention
from mud_puppy.model.arch import Arch
from mud_puppy.model.attention import attend
from mud_puppy.model.rope import rope_tables, rotate
from mud_puppy.model.tile import over_tiles
from mud_puppy.parallel import split_batch, split_lookup
from mud_puppy.weights import embed, linear, linears
from mud_puppy.weights.tree import at_repeat, repeats, spans

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """tokens, positions, segment_ids int32 [B, T] (segment 0 is padding, None: all one example).

    positions count from 0 in each example. `embeds` [N, D] replaces the embedding of token (b, t)
    by row `embed_index[b, t]` where that is >= 0 (images).
    """

    tokens: Any
    positions: Any = None
    segment_ids: Any = None
    embeds: Any = None
    embed_index: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [L, B, S, K, hd]; slot s holds the token at position s."""

    k: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer reads and none changes. tile: see `tile.over_tiles`."""

    arch: Arch = field(metadata={"static": True})
    positions: Any
    segment_ids: Any
    cos: Any
    sin: Any
    tile: int | None = field(default=None, metadata={"static": True})


def make_cache(arch: Arch, batch: int, slots: int, dtype: Any) -> Cache:
    shape = (arch.layers, batch, slots, arch.kv_heads, arch.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def decode(
    arch: Arch,
    params: Tree,
    inputs: Inputs,
    cache: Cache | None,
    run_layers: Callable[..., tuple[Array, Cache | None]],
    dtype: Any = None,
    tile: int | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Hidden states after the final norm, in `dtype` (None: the embedding's own), and the cache."""
    x, context = begin(arch, params, inputs, dtype, tile)
    for group, start in spans(params):
        windows = arch.windows[start : start + len(group)]
        layers = partial(_period, context, windows)
        x, cache = run_layers(layers, group, x, cache, start)
    return rms_norm(x, params["final_norm"], arch.norm_eps), cache


def begin(
    arch: Arch, params: Tree, inputs: Inputs, dtype: Any = None, tile: int | None = None
) -> tuple[Float[Array, "B T D"], Context]:
    """What the first layer reads, and what every layer does."""
    x = split_lookup(embed(params["embed"], inputs.tokens))
    if inputs.embeds is not None:
        given = inputs.embeds[jnp.maximum(inputs.embed_index, 0)].astype(x.dtype)
        x = jnp.where(inputs.embed_index[..., None] >= 0, given, x)
    return split_batch(x if dtype is None else x.astype(dtype)), make_context(arch, inputs, tile)


def make_context(arch: Arch, inputs: Inputs, tile: int | None = None) -> Context:
    positions = inputs.positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape)
    cos, sin = rope_tables(arch.rope, positions, inputs.segment_ids)
    return Context(arch, positions, inputs.segment_ids, cos, sin, tile)


def scan_layers(
    layers: Callable,
    group: list[Tree],
    x: Array,
    cache: Cache | None,
    start: int,
    remat: str = "full",
) -> tuple[Array, Cache | None]:
    """Runs a group with one `lax.scan` over its repeats.

    remat, what the backward pass finds saved: "full": only each repeat's input; "offload": that in
    the host's memory; "attention": its attention output too; "projections": also q, k, v, gate and
    up; "none": everything. What runs in tiles is computed again in each case, from what these keep.
    With a cache there is no backward pass in mind, and codes of quantized weights are read in
    place.
    """

    def body(carry: Any, step: Any) -> tuple[Any, None]:
        (x, cache), (blocks, r) = carry, step
        x = checkpoint_name(x, "layer_input")
        return layers(blocks, x, cache, start + r * len(group)), None

    def in_place(carry: Any, r: Any) -> tuple[Any, None]:
        return body(carry, (at_repeat(group, r), r))

    rs = jnp.arange(repeats(group))
    if cache is not None:
        return jax.lax.scan(in_place, (x, cache), rs)[0]
    if remat != "none":
        # Inside of a loop there is nothing to merge the second forward pass with, and guards
        # against it copy each layer's weights out of their stack.
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
    (x, cache), _ = jax.lax.scan(body, (x, cache), (group, rs))
    return x, cache


_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "projections": jax.checkpoint_policies.save_only_these_names("attention", "qkv", "gate_up"),
}


def _period(
    context: Context,
    windows: tuple,
    blocks: list[Tree],
    x: Array,
    cache: Cache | None,
    layer: Array,
) -> tuple[Array, Cache | None]:
    """One repeat of a group's pattern; `layer` is the number of its first layer."""
    for j, (p, window) in enumerate(zip(blocks, windows, strict=True)):
        x, cache = run_block(context, window, p, x, cache, layer + j)
    return x, cache


def run_block(
    context: Context,
    window: int | None,
    p: Tree,
    x: Array,
    cache: Cache | None,
    layer: Array,
) -> tuple[Array, Cache | None]:
    """One layer of params p (not stacked); `layer` is its number, which the cache goes by.

    With a tile and no cache, all but attention runs tile after tile.
    """
    tiled = partial(over_tiles, context.tile if cache is None else None)
    before, after = partial(_to_attention, context.arch), partial(_from_attention, context.arch)
    q, k, v = tiled(before, p, x, context.cos, context.sin)
    if cache is None:
        out = attend(q, k, v, context.segment_ids, window)
    else:
        cache = _write(cache, layer, context.positions, k, v)
        # The whole cache and a layer's number: a kernel reads the layer where it lies.
        out = decode_attention(q, cache.k, cache.v, context.positions, layer=layer, window=window)
    return split_batch(tiled(after, p, x, out)), cache


def _to_attention(
    arch: Arch, p: Tree, x: Array, cos: Array, sin: Array
) -> tuple[Float[Array, "B T H hd"], Float[Array, "B T K hd"], Float[Array, "B T K hd"]]:
    x = rms_norm(x, p["attn_norm"], arch.norm_eps)
    p = p["self_attn"]
    qkv = _modules(x, [p["q_proj"], p["k_proj"], p["v_proj"]])
    q, k, v = (checkpoint_name(y, "qkv").reshape(*x.shape[:-1], -1, arch.head_dim) for y in qkv)
    if "q_norm" in p:
        q = rms_norm(q, p["q_norm"], arch.norm_eps)
        k = rms_norm(k, p["k_norm"], arch.norm_eps)
    q, k = (rotate(y, cos, sin) for y in (q, k))
    return q, k, v


def _from_attention(
    arch: Arch, p: Tree, x: Float[Array, "B T D"], out: Float[Array, "B T H hd"]
) -> Float[Array, "B T D"]:
    # flash_attention names its residuals "attention" itself.
    x = x + _modules(out.reshape(*x.shape[:-1], -1), [p["self_attn"]["o_proj"]])[0]
    return x + _mlp(arch, p["mlp"], rms_norm(x, p["mlp_norm"], arch.norm_eps))


def _write(cache: Cache, layer: Array, positions: Array, k: Array, v: Array) -> Cache:
    rows = jnp.arange(k.shape[0])[:, None]
    return Cache(
        cache.k.at[layer, rows, positions].set(k.astype(cache.k.dtype)),
        cache.v.at[layer, rows, positions].set(v.astype(cache.v.dtype)),
    )


_ACT = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _mlp(arch: Arch, p: Tree, x: Array) -> Array:
    gate, up = (checkpoint_name(y, "gate_up") for y in _modules(x, [p["gate_proj"], p["up_proj"]]))
    return _modules(_ACT[arch.act](gate) * up, [p["down_proj"]])[0]


def _modules(x: Array, modules: list[Tree]) -> list[Array]:
    """x @ weight.T + bias of several linear modules that read the same x."""
    ys = linears(x, [m["weight"] for m in modules])
    return [
        y + m["bias"].astype(y.dtype) if "bias" in m else y
        for y, m in zip(ys, modules, strict=True)
    ]


def rms_norm(x: Float[Array, "*B n"], w: Float[Array, " n"], eps: float) -> Float[Array, "*B n"]:
    """Root-mean-square norm over the last axis, the mean in float32 (arXiv:1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * w.astype(x.dtype)


def head(params: Tree) -> Any:
    """The output head [V, D]: its own leaf, or the embedding where they are tied."""
    return params.get("head", params["embed"])


def logits(params: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return linear(hidden, head(params)).astype(jnp.float32)
