"""`expert_linear(x, w, sizes)`: rows sorted by expert times their experts' weights, whatever w is.

What `linear` is for one weight, for a stack of experts [E, out, in]; each product is grouped
(`kernels.grouped_matmul`). DoRA of experts and float8 products are not here: `add_lora` refuses
the one, `fp8` leaves experts as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import grouped_matmul
from mud_puppy.weights.leaf import FakeQuant, Int8Dynamic, Lora, is_weight
from mud_puppy.weights.linear import dense
from mud_puppy.weights.merged import Merged, merged
from mud_puppy.weights.observe import ObservedExperts, add_experts
from mud_puppy.weights.rounding import round_rows
from mud_puppy.weights.tree import Tree

_RANKS = 16  # the kernels take sizes that are multiples of it


def expert_linear(x: Float[Array, "M n"], w: Any, sizes: Int[Array, " E"]) -> Float[Array, "M m"]:
    """The first sizes[0] rows of x times w[0].T, the next w[1].T, ... in x's dtype."""
    match w:
        case Lora():
            y, z = expert_linear(x, w.base, sizes), grouped_matmul(_dropout(x, w), _a(w), sizes)
            return y + grouped_matmul(z, _b(w), sizes)
        case FakeQuant():
            x = round_rows(x) if w.activations == "int8" else x
            return grouped_matmul(x, dense(w).astype(x.dtype), sizes)
        case Int8Dynamic():
            # Codes times a scale on both sides, as a FakeQuant trained it; products are of floats.
            return grouped_matmul(round_rows(x), w.base, sizes)
        case Merged():
            return grouped_matmul(x, merged(w), sizes)
        case ObservedExperts():
            add_experts(w, x, sizes)
            return expert_linear(x, w.base, sizes)
    return grouped_matmul(x, w, sizes)


def own_dropout(params: Tree, index: Array) -> Tree:
    """Experts' weights whose dropout differs between devices that each have rows of their own;
    index: int32 [], the device's number."""

    def own(w: Any) -> Any:
        if not isinstance(w, Lora) or w.key is None:
            return w
        return jax.tree.map(
            lambda x: jax.vmap(lambda key: jax.random.fold_in(key, index))(x) if _is_key(x) else x,
            w,
        )

    return jax.tree.map(own, params, is_leaf=is_weight)


def observed(params: Tree) -> bool:
    """Whether one of these weights is an `ObservedExperts`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, ObservedExperts))
    return any(isinstance(w, ObservedExperts) for w in leaves)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _a(w: Lora) -> Float[Array, "E r n"]:
    return jnp.pad(w.a, ((0, 0), (0, -w.a.shape[-2] % _RANKS), (0, 0)))


def _b(w: Lora) -> Float[Array, "E m r"]:
    scaled = w.b * w.scale[:, None, None]
    return jnp.pad(scaled, ((0, 0), (0, 0), (0, -scaled.shape[-1] % _RANKS)))


def _dropout(x: Float[Array, "M n"], w: Lora) -> Float[Array, "M n"]:
    """The adapter's input with some numbers 0; one key serves all rows."""
    if w.key is None or w.dropout == 0.0:
        return x
    keep = jax.random.bernoulli(w.key[0], 1 - w.dropout, x.shape)
    return jnp.where(keep, x / (1 - w.dropout), 0).astype(x.dtype)
