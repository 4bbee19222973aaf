"""A mixture of experts: the router's choice, and the chosen experts' MLPs, no token dropped.

Tokens are sorted by expert and each weight is one grouped product (`kernels.grouped_matmul`).
Sources: Switch arXiv:2101.03961, Mixtral arXiv:2401.04088, DeepSeek-V3 arXiv:2412.19437.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mud_puppy.model.arch import Arch, Experts
from mud_puppy.model.mlp import gated, mlp, module
from mud_puppy.parallel import BATCH
from mud_puppy.weights.experts import expert_linear, observed, own_dropout

Tree = Any
Routed = tuple[Float[Array, "B T E"], Int[Array, "B T k"]]


def moe(
    arch: Arch, p: Tree, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T D"], Routed]:
    """The experts' output; the router's logits in float32 and its choice, for losses and metrics.

    mask: tokens that are no padding, which no expert is given.
    """
    assert arch.experts is not None
    logits = router_logits(p, x)
    weights, chosen = route(arch.experts, logits, p.get("choice_bias"))
    if mask is not None:
        weights = jnp.where(mask[..., None], weights, 0)
        chosen = jnp.where(mask[..., None], chosen, arch.experts.count)
    y = _on_mesh(arch, p["experts"], x, weights, chosen)
    if "shared" in p:
        shared = mlp(arch, p["shared"], x)
        if "shared_expert_gate" in p:
            shared = jax.nn.sigmoid(module(p["shared_expert_gate"], x)) * shared
        y = y + shared
    return y, (logits, chosen)


def router_logits(p: Tree, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    """In float32: two experts that differ by less than a bfloat16 are still in order."""
    highest = jax.lax.Precision.HIGHEST
    w = p["router"].astype(jnp.float32)
    logits = jnp.einsum("btd,ed->bte", x.astype(jnp.float32), w, precision=highest)
    return logits + p["router_bias"].astype(jnp.float32) if "router_bias" in p else logits


def route(
    experts: Experts, logits: Float[Array, "B T E"], bias: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """(weights, experts) of each token. bias: added for the choice, not to the weights."""
    if experts.score == "softmax_chosen":
        best, chosen = jax.lax.top_k(logits, experts.per_token)
        return jax.nn.softmax(best, axis=-1), chosen
    scores = jax.nn.sigmoid(logits) if experts.score == "sigmoid" else jax.nn.softmax(logits)
    choice = scores if bias is None else scores + bias.astype(jnp.float32)
    if experts.groups > 1:
        choice = _best_groups(experts, choice)
    chosen = jax.lax.top_k(choice, experts.per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * experts.scale, chosen


def _best_groups(experts: Experts, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Scores with those of all but the best groups below any other."""
    *lead, E = scores.shape
    grouped = scores.reshape(*lead, experts.groups, E // experts.groups)
    value = jax.lax.top_k(grouped, 2 if experts.group_pairs else 1)[0].sum(-1)
    best = jax.lax.top_k(value, experts.groups_per_token)[1]
    kept = jax.nn.one_hot(best, experts.groups, dtype=jnp.bool_).any(-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(*lead, E)


def _on_mesh(arch: Arch, p: Tree, x: Array, weights: Array, chosen: Array) -> Array:
    """`_chosen` of each device's own tokens, with all experts.

    A batch that the devices do not divide is computed whole on each, as attention is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # What notes its inputs notes those of all devices.
    if mesh.empty or mesh.size == 1 or observed(p):
        return _chosen(arch, p, x, weights, chosen)

    def own(p: Tree, *args: Array) -> Array:
        p = own_dropout(p, jax.lax.axis_index(mesh.axis_names))
        return _chosen(arch, p, *args)

    spec = PartitionSpec() if x.shape[0] % mesh.size else BATCH
    whole = jax.tree.map(lambda _: PartitionSpec(), p)
    # check_vma: the kernels' custom_vjps do not say how their results vary over the mesh.
    sharded = jax.shard_map(
        own, in_specs=(whole, spec, spec, spec), out_specs=spec, check_vma=False
    )
    return sharded(p, x, weights, chosen)


def _chosen(arch: Arch, p: Tree, x: Array, weights: Array, chosen: Array) -> Array:
    """Sum over the chosen experts of weight * expert(x), [B, T, D]."""
    assert arch.experts is not None
    B, T, D = x.shape
    k, E = arch.experts.per_token, arch.experts.count
    of = chosen.reshape(-1)
    order = jnp.argsort(of)
    # What is given to no expert comes last, and is dropped here.
    sizes = jnp.zeros(E, jnp.int32).at[of].add(1, mode="drop")
    # Each token k times, then into the experts' order: both ways a permutation, which adds nothing
    # up, so that gradients are sums in a fixed order.
    copies = jnp.broadcast_to(x.reshape(-1, 1, D), (B * T, k, D)).reshape(-1, D)
    rows = _permuted(copies, order)
    y = _experts(arch, p, rows, sizes, of[order])
    y = _permuted(y, jnp.argsort(order)).reshape(B * T, k, D)
    return jnp.einsum("nkd,nk->nd", y, weights.reshape(-1, k).astype(y.dtype)).reshape(B, T, D)


def _permuted(x: Array, order: Array) -> Array:
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _experts(arch: Arch, p: Tree, x: Array, sizes: Array, of: Array) -> Array:
    """Every row through its own expert; rows are sorted by expert, `of` says which."""
    apply = partial(_module, x_sizes=sizes, of=of)
    if "gate_up_proj" in p:
        both = apply(p["gate_up_proj"], x)
        gate, up = both[..., ::2], both[..., 1::2]  # gpt-oss stores them in turn
    else:
        gate, up = apply(p["gate_proj"], x), apply(p["up_proj"], x)
    return apply(p["down_proj"], gated(arch, gate, up))


def _module(m: Tree, x: Array, x_sizes: Array, of: Array) -> Array:
    y = expert_linear(x, m["weight"], x_sizes)
    return y + m["bias"].astype(y.dtype)[of] if "bias" in m else y
