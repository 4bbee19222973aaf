"""How evenly routers use the experts: the sums that their losses and metrics are made of.

Load balancing after Switch (arXiv:2101.03961, equations 4-6), over all layers at once as
transformers has it; router z-loss after ST-MoE (arXiv:2202.08906, equation 5).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mud_puppy.model.arch import Arch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Sums over tokens (padding left out) and layers.

    chosen, probs: float32 [E], how often each expert was among the best k, and its probability. z:
    the square of the logits' log-sum-exp. count: tokens times layers.
    """

    chosen: Any
    probs: Any
    z: Any
    count: Any


def no_routing(arch: Arch) -> Routing | None:
    """Nothing yet; None for a model without experts."""
    if arch.experts is None:
        return None
    zeros, zero = jnp.zeros(arch.experts.count), jnp.float32(0)
    return Routing(zeros, zeros, zero, zero)


def routing_of(
    arch: Arch, logits: Float[Array, "B T E"], chosen: Int[Array, "B T k"], segment_ids: Any
) -> Routing:
    """The sums of one layer, of its router's logits and the experts that it chose."""
    assert arch.experts is not None
    real = jnp.ones(logits.shape[:2]) if segment_ids is None else segment_ids > 0
    real = real.astype(jnp.float32)
    hits = jax.nn.one_hot(chosen, arch.experts.count).sum(-2)
    if arch.experts.score == "sigmoid":  # DeepSeek-V3, arXiv:2412.19437, equation 19
        scores = jax.nn.sigmoid(logits)
        probs = scores / scores.sum(-1, keepdims=True)
    else:
        probs = jax.nn.softmax(logits, axis=-1)
    return Routing(
        chosen=jnp.einsum("bte,bt->e", hits, real),
        probs=jnp.einsum("bte,bt->e", probs, real),
        z=(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real).sum(),
        count=real.sum(),
    )


def router_losses(routing: Routing | None) -> dict[str, tuple[Array, Array]]:
    """{name: (sum, count)}: `load_balance`, E for k = 1 experts that are chosen evenly ... k, and
    `router_z`; empty without experts."""
    if routing is None:
        return {}
    count = jnp.maximum(routing.count, 1)
    balance = len(routing.probs) * (routing.chosen / count) @ (routing.probs / count)
    return {"load_balance": (balance * count, count), "router_z": (routing.z, count)}
