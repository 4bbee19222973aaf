"""One layer: attention and what follows it, each between the norms that the family has.

Which norms, biases and sinks there are is said by the leaves that are present; what is left of the
differences between families is in `Arch`.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mud_puppy.kernels import decode_attention
from mud_puppy.model.arch import Arch, Layer
from mud_puppy.model.attention import attend
from mud_puppy.model.context import Cache, Context, write
from mud_puppy.model.latent import latent_qkv
from mud_puppy.model.mlp import mlp, module, modules
from mud_puppy.model.moe import Routed, moe
from mud_puppy.model.norm import layer_norm, norm, rms_norm
from mud_puppy.model.rope import rotate
from mud_puppy.model.tile import over_tiles
from mud_puppy.parallel import split_batch

Tree = Any


def run_block(
    context: Context, kind: Layer, p: Tree, x: Array, cache: Cache | None, layer: Array
) -> tuple[Float[Array, "B T D"], Cache | None, Routed | None]:
    """One layer of params p (not stacked); `layer` is its number, which the cache goes by.

    With a tile and no cache, all but attention runs tile after tile. The third result is what the
    router of a layer with experts did.
    """
    arch, p = context.arch, canonical(context.arch, p)
    tiled = partial(over_tiles, context.tile if cache is None else None)
    rope = () if kind.rope is None else context.ropes[kind.rope]
    q, k, v = tiled(partial(_to_attention, arch), p, x, *rope)
    options = {
        "window": kind.window,
        "scale": arch.attn_scale,
        "softcap": arch.attn_softcap,
        "sinks": p["self_attn"].get("sinks"),
    }
    if cache is None:
        out = attend(q, k, v, context.segment_ids, context.prefix_ids, **options)
    else:
        cache = write(cache, layer, context.positions, k, v)
        # The whole cache and a layer's number: a kernel reads the layer where it lies.
        out = decode_attention(q, cache.k, cache.v, context.positions, layer=layer, **options)
        out = out[..., : arch.value_dim]
    mask = () if context.segment_ids is None else (context.segment_ids > 0,)
    x, routed = tiled(partial(_from_attention, arch), p, x, out, *mask)
    return split_batch(x), cache, routed


def canonical(arch: Arch, p: Tree) -> Tree:
    """A block's params with our names of modules: what is `attn/c_attn` in a GPT-2 file is
    `self_attn/qkv_proj`, as everywhere."""
    for theirs, ours in arch.renames:
        p = renamed(p, theirs, ours)
    return p


def original(arch: Arch, p: Tree) -> Tree:
    """The inverse of `canonical`."""
    for theirs, ours in reversed(arch.renames):
        p = renamed(p, ours, theirs)
    return p


def renamed(p: Tree, before: str, after: str) -> Tree:
    """p with one subtree under another path; p itself where it has none."""
    *parents, last = before.split("/")
    if parents:
        part = p.get(parents[0])
        if part is None:
            return p
        assert after.split("/")[0] == parents[0], "a rename stays in its part"
        return {**p, parents[0]: renamed(part, before.split("/", 1)[1], after.split("/", 1)[1])}
    return {after if name == last else name: child for name, child in p.items()}


def _to_attention(
    arch: Arch, p: Tree, x: Array, *rope: Array
) -> tuple[Float[Array, "B T H hd"], Float[Array, "B T K hd"], Float[Array, "B T K vd"]]:
    x = norm(arch, p, "attn_norm", x)
    p = p["self_attn"]
    if arch.latent is not None:
        return latent_qkv(arch, p, x, *rope)
    q, k, v = _qkv(arch, p, x)
    if "q_norm" in p:
        q, k = (_head_norm(arch, p[n], y) for n, y in (("q_norm", q), ("k_norm", k)))
    if rope:
        cos, sin = rope
        q, k = (rotate(y, cos, sin, arch.interleaved) for y in (q, k))
    return q, k, v


def _qkv(arch: Arch, p: Tree, x: Array) -> list[Array]:
    """q [B, T, H, hd], k and v [B, T, K, hd], from one projection or three."""
    lead, hd = x.shape[:-1], arch.head_dim
    if "qkv_proj" not in p:
        parts = modules(x, [p["q_proj"], p["k_proj"], p["v_proj"]])
    else:
        whole = module(p["qkv_proj"], x)
        if arch.qkv_by_head:
            heads = checkpoint_name(whole, "qkv").reshape(*lead, arch.heads, 3, hd)
            return [heads[..., i, :] for i in range(3)]
        q, kv = arch.heads * hd, arch.kv_heads * hd
        parts = jnp.split(whole, [q, q + kv], axis=-1)
    return [checkpoint_name(y, "qkv").reshape(*lead, -1, hd) for y in parts]


def _head_norm(arch: Arch, w: Array, y: Float[Array, "B T n hd"]) -> Float[Array, "B T n hd"]:
    """The norm of queries or keys: of a head, or of the whole width."""
    whole = arch.qk_norm == "width"
    z = y.reshape(*y.shape[:-2], -1) if whole else y
    if arch.norm == "layer":
        return layer_norm(z, w, None, arch.norm_eps).reshape(y.shape)
    return rms_norm(z, w, arch.norm_eps, arch.norm_offset).reshape(y.shape)


def _from_attention(
    arch: Arch,
    p: Tree,
    x: Float[Array, "B T D"],
    out: Float[Array, "B T H hd"],
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Routed | None]:
    # flash_attention names its residuals "attention" itself.
    y = module(p["self_attn"]["o_proj"], out.reshape(*x.shape[:-1], -1))
    y = norm(arch, p, "attn_post_norm", y)
    if arch.parallel:
        # Some have one norm for both parts.
        z = norm(arch, p, "mlp_norm" if "mlp_norm" in p else "attn_norm", x)
        z, routed = _inner(arch, p["mlp"], z, mask)
        return x + y + z, routed
    x = x + _scaled(arch, y)
    z, routed = _inner(arch, p["mlp"], norm(arch, p, "mlp_norm", x), mask)
    return x + _scaled(arch, norm(arch, p, "mlp_post_norm", z)), routed


def _inner(arch: Arch, p: Tree, x: Array, mask: Any) -> tuple[Array, Routed | None]:
    return moe(arch, p, x, mask) if "router" in p else (mlp(arch, p, x), None)


def _scaled(arch: Arch, y: Array) -> Array:
    return y if arch.residual_scale == 1.0 else y * arch.residual_scale
