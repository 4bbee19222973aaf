"""`Observed`: a weight that notes what its inputs are, so that a model is observed unawares.

It lives inside one jitted call and never in a params tree: the caller puts it into a block, runs
the block, and takes the sums out of the references.

    refs = jax.tree.map(jax.new_ref, moments)
    block["mlp"]["down_proj"]["weight"] = Observed(w, refs, mask)
    run_block(...)
    moments = jax.tree.map(jax.freeze, refs)

What the block computes after its last observed product is dropped by XLA when nobody asks for it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.kernels import grouped_matmul, matmul
from mud_puppy.kernels.matmul import exact


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over the tokens x [in] that met a weight, float32.

    hessian     [in, in], sum of 2 x^T x: that of the squared error of the outputs
    magnitude   [in], sum of |x|
    count       [], tokens

    Of experts, each behind an axis of experts: the tokens that each was given.
    """

    # Any: arrays, or references to them.
    hessian: Any
    magnitude: Any
    count: Any


def no_moments(inputs: int, experts: int | None = None) -> Moments:
    """Moments of no tokens, for a weight [out, inputs] or [experts, out, inputs]."""
    lead = () if experts is None else (experts,)
    shapes = (*lead, inputs, inputs), (*lead, inputs), lead
    return Moments(*map(jnp.zeros, shapes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observed:
    """`base`, whose product adds its input to `refs` (Moments of references).

    mask: bool, of the shape of the input without its last axis: tokens that count; None for all.
    """

    base: Any
    refs: Any
    mask: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ObservedExperts:
    """`base` [E, out, in], whose grouped product adds the rows of as many experts as `refs` has,
    from expert `first` (int32 []) on, to `refs`. Padding is given to no expert."""

    base: Any
    refs: Any
    first: Any


def add_experts(w: ObservedExperts, x: Array, sizes: Array) -> None:
    """Notes rows x [M, in], sorted by expert."""
    count = w.refs.count.shape[0]
    before = jnp.where(jnp.arange(len(sizes)) < w.first, sizes, 0).sum()
    own = jax.lax.dynamic_slice_in_dim(sizes, w.first, count)
    x = jnp.roll(x, -before, axis=0)
    # The gradient of a grouped product's weight is each group's y^T x: with y = x, the square.
    none = jnp.zeros((count, x.shape[1], x.shape[1]), jnp.float32)
    (square,) = jax.vjp(lambda w: grouped_matmul(x, w, own), none)[1](x)
    w.refs.hessian[...] += 2 * square
    w.refs.magnitude[...] += _sums(jnp.abs(x.astype(jnp.float32)), own)
    w.refs.count[...] += own.astype(jnp.float32)


@matmul.register(Observed)
def _observed_matmul(w: Observed, x: Array) -> Array:
    _add(w.refs, x, w.mask)
    return matmul(x, w.base)


def _add(refs: Moments, x: Array, mask: Array | None) -> None:
    if mask is None:
        mask = jnp.ones(x.shape[:-1], bool)
    # Padding is selected away, not multiplied by 0: it may hold anything.
    x = jnp.where(mask[..., None], x, 0).reshape(-1, x.shape[-1])
    # Products of 16-bit numbers are exact in float32, where they are summed.
    square = jnp.matmul(x.T, x, precision=exact(x.dtype), preferred_element_type=jnp.float32)
    refs.hessian[...] += 2 * square
    refs.magnitude[...] += jnp.abs(x.astype(jnp.float32)).sum(0)
    refs.count[...] += mask.sum().astype(jnp.float32)


def _sums(x: Array, sizes: Array) -> Array:
    """[E, in]: the sum of each group's rows."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    return jax.ops.segment_sum(x, group, num_segments=len(sizes))
