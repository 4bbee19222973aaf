"""Merged models without a copy: what `merge_lora` would write, made anew at each product.

To measure a merged model beside the one that trained, where both do not fit into memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, matmul
from mud_puppy.weights.leaf import Lora, base_of, is_weight
from mud_puppy.weights.linear import dense
from mud_puppy.weights.quantize import Scheme, path_of
from mud_puppy.weights.tree import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Merged:
    """base: a Lora, whose matrix is rounded to `dtype` (static) before each product."""

    base: Any
    dtype: str = field(metadata={"static": True})


def merged_view(params: Tree, dtype: str) -> Tree:
    """`params` whose products are those of the model merged in `dtype`; for forward passes.

    Weights that stand alone (embedding, head) are merged: they are looked up too, not only
    multiplied by.
    """

    def view(w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        rounded = w.a.ndim == 2
        return _sum(w, dtype).astype(base_of(w).dtype) if rounded else Merged(w, dtype)

    return jax.tree.map(view, params, is_leaf=is_weight)


def merge_quantized(params: Tree, scheme: Scheme, dtype: str) -> Tree:
    """The model with its adapters added in, in the codes of `scheme`, from the sums rounded to
    `dtype`; what `scheme` leaves alone is in `dtype`, and codes that are as it says stay as they
    are. One layer at a time is in floats. A UserError names a weight that no group divides."""

    def change(path: tuple, w: Any) -> Any:
        encode = scheme.of(path_of(path))
        if encode is None:
            return _sum(w, dtype) if is_weight(w) else w
        try:
            return w if _is_coded(w, encode, dtype) else _merge_and_encode(w, dtype, encode)
        except ValueError as error:
            raise UserError(f"{path_of(path)} cannot be quantized: {error}") from None

    return jax.tree.map_with_path(change, params, is_leaf=is_weight)


def _sum(w: Any, dtype: str) -> Array:
    return dense(w).astype(dtype)


def _is_coded(w: Any, encode: Callable, dtype: str) -> bool:
    """Whether w is what `encode` would make, but for the values of its codes."""
    if not isinstance(w, Quantized):
        return False
    made = jax.eval_shape(encode, jax.ShapeDtypeStruct(w.shape, w.dtype))
    kinds = [(x.shape, x.dtype) for x in jax.tree.leaves(w)]
    same = jax.tree.structure(w) == jax.tree.structure(made)
    return same and kinds == [(x.shape, x.dtype) for x in jax.tree.leaves(made)]


def _merge_and_encode(w: Any, dtype: str, encode: Callable) -> Any:
    def one(w: Any) -> Any:
        # One matrix at a time: layer by layer, and expert by expert.
        return encode(_sum(w, dtype)) if base_of(w).ndim == 2 else jax.lax.map(one, w)

    return jax.jit(one)(w)


@matmul.register(Merged)
def _merged_matmul(w: Merged, x: Array) -> Array:
    return matmul(x, merged(w))


def merged(w: Merged) -> Array:
    """The matrix of each product."""
    return dense(replace(w.base, key=None)).astype(jnp.dtype(w.dtype))
