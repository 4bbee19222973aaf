"""The one decoder: embedding, blocks of attention and MLP, final norm, as functions of params.

What differs between families is in `Arch` and in which leaves are present (a bias, a q_norm, an
untied head); nothing here asks for a family's name. How layers are run is injected (`scan_layers`
here; streaming and pipelined runners come from `parallel/`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch, Layer
from mud_puppy.model.balance import Routing, no_routing, routing_of
from mud_puppy.model.block import run_block
from mud_puppy.model.context import Cache, Context, Inputs, make_cache, make_context
from mud_puppy.model.norm import norm
from mud_puppy.parallel import split_batch, split_lookup
from mud_puppy.weights import embed, linear
from mud_puppy.weights.tree import at_repeat, repeats, spans

__all__ = [
    "Cache",
    "Inputs",
    "decode",
    "head",
    "logits",
    "make_cache",
    "outputs",
    "scan_layers",
    "score_head",
]

Tree = Any


def decode(
    arch: Arch,
    params: Tree,
    inputs: Inputs,
    cache: Cache | None,
    run_layers: Callable[..., tuple[Array, Cache | None, Routing | None]],
    dtype: Any = None,
    tile: int | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None, Routing | None]:
    """Hidden states after the final norm, in `dtype` (None: the embedding's own), the cache, and
    what the routers of all layers did (None without experts).

    A model's `logit_scale` is in the hidden states, so that the head is a plain product.
    """
    if cache is not None and inputs.prefix_ids is not None:
        raise ValueError("prefix_ids are for batches without a cache")
    x, context = begin(arch, params, inputs, dtype, tile)
    routed = no_routing(arch)
    for group, start in spans(params):
        kinds = arch.kinds[start : start + len(group)]
        layers = partial(_period, context, kinds)
        x, cache, own = run_layers(layers, group, x, cache, start)
        routed = jax.tree.map(jnp.add, routed, own)
    x = norm(arch, params, "final_norm", x)
    return (x if arch.logit_scale == 1.0 else x * arch.logit_scale), cache, routed


def begin(
    arch: Arch, params: Tree, inputs: Inputs, dtype: Any = None, tile: int | None = None
) -> tuple[Float[Array, "B T D"], Context]:
    """What the first layer reads, and what every layer does."""
    context = make_context(arch, inputs, tile)
    x = split_lookup(embed(params["embed"], inputs.tokens))
    if inputs.embeds is not None:
        given = inputs.embeds[jnp.maximum(inputs.embed_index, 0)].astype(x.dtype)
        x = jnp.where(inputs.embed_index[..., None] >= 0, given, x)
    if arch.embed_scale != 1.0:
        # Rounded to the embedding's dtype first, as Gemma was trained.
        x = x * jnp.asarray(arch.embed_scale, x.dtype)
    if arch.learned_positions:
        x = x + embed(params["positions"], context.positions).astype(x.dtype)
    return split_batch(x if dtype is None else x.astype(dtype)), context


def scan_layers(
    layers: Callable,
    group: list[Tree],
    x: Array,
    cache: Cache | None,
    start: int,
    remat: str = "full",
) -> tuple[Array, Cache | None, Routing | None]:
    """Runs a group with one `lax.scan` over its repeats.

    remat, what the backward pass finds saved: "full": only each repeat's input; "offload": that in
    the host's memory; "attention": its attention output too; "projections": also q, k, v, gate and
    up; "none": everything. What runs in tiles is computed again in each case, from what these keep.
    With a cache there is no backward pass in mind, and codes of quantized weights are read in
    place.
    """

    def body(carry: Any, step: Any) -> tuple[Any, Any]:
        (x, cache), (blocks, r) = carry, step
        x = checkpoint_name(x, "layer_input")
        x, cache, routed = layers(blocks, x, cache, start + r * len(group))
        return (x, cache), routed

    def in_place(carry: Any, r: Any) -> tuple[Any, Any]:
        return body(carry, (at_repeat(group, r), r))

    def summed(scanned: Any) -> tuple[Array, Cache | None, Routing | None]:
        (x, cache), routed = scanned
        return x, cache, jax.tree.map(lambda x: x.sum(0), routed)

    rs = jnp.arange(repeats(group))
    if cache is not None:
        return summed(jax.lax.scan(in_place, (x, cache), rs))
    if remat != "none":
        # Inside of a loop there is nothing to merge the second forward pass with, and guards
        # against it copy each layer's weights out of their stack.
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
    return summed(jax.lax.scan(body, (x, cache), (group, rs)))


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
    kinds: tuple[Layer, ...],
    blocks: list[Tree],
    x: Array,
    cache: Cache | None,
    layer: Array,
) -> tuple[Array, Cache | None, Routing | None]:
    """One repeat of a group's pattern; `layer` is the number of its first layer."""
    total = no_routing(context.arch)
    for j, (p, kind) in enumerate(zip(blocks, kinds, strict=True)):
        x, cache, routed = run_block(context, kind, p, x, cache, layer + j)
        if routed is not None:
            own = routing_of(context.arch, *routed, context.segment_ids)
            total = jax.tree.map(jnp.add, total, own)
    return x, cache, total


def head(params: Tree) -> Any:
    """The output head [V, D]: its own leaf, or the embedding where they are tied. UserError for a
    classification model, which has none."""
    if "score" in params:
        raise UserError(
            "a classification model gives scores, not the next token's logits: load its language "
            "model for that"
        )
    return params.get("head", params["embed"])


def logits(arch: Arch, params: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    y = linear(hidden, head(params)).astype(jnp.float32)
    if arch.logit_softcap is None:
        return y
    return arch.logit_softcap * jnp.tanh(y / arch.logit_softcap)


def score_head(hidden: Float[Array, "*B D"], params: Tree) -> Float[Array, "*B labels"]:
    """A classification model's scores of hidden states (`Model.forward`'s, of all tokens or some),
    float32: `hidden @ weight.T + bias`, without bias where there is none."""
    own = params["score"]
    # float32 without TF32: the products are few, and rewards differ by little.
    wide = (x.astype(jnp.float32) for x in (hidden, own["weight"]))
    y = jnp.einsum("...d,ld->...l", *wide, precision=jax.lax.Precision.HIGHEST)
    return y + own["bias"].astype(jnp.float32) if "bias" in own else y


def outputs(arch: Arch, params: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T _"]:
    """What the model's head gives at every position: logits, or scores."""
    return logits(arch, params, hidden) if arch.task == "lm" else score_head(hidden, params)
