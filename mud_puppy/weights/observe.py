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

from mud_puppy.kernels import matmul
from mud_puppy.kernels.matmul import exact


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over the tokens x [in] that met a weight, float32.

    hessian     [in, in], sum of 2 x^T x: that of the squared error of the outputs
    magnitude   [in], sum of |x|
    count       [], tokens
    """

    # Any: arrays, or references to them.
    hessian: Any
    magnitude: Any
    count: Any


def no_moments(inputs: int) -> Moments:
    """Moments of no tokens, for a weight [out, inputs]."""
    return Moments(jnp.zeros((inputs, inputs)), jnp.zeros(inputs), jnp.float32(0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observed:
    """`base`, whose product adds its input to `refs` (Moments of references).

    mask: bool, of the shape of the input without its last axis: tokens that count; None for all.
    """

    base: Any
    refs: Any
    mask: Any = None


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
