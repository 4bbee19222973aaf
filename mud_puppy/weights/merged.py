"""Merged models without a copy: what `merge_lora` would write, made anew at each product.

To measure a merged model beside the one that trained, where both do not fit into memory.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.kernels import matmul
from mud_puppy.weights.leaf import Lora, is_weight
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
    """`params` whose products are those of the model merged in `dtype`; for forward passes."""

    def view(w: Any) -> Any:
        return Merged(w, dtype) if isinstance(w, Lora) else w

    return jax.tree.map(view, params, is_leaf=is_weight)


def merge_quantized(params: Tree, scheme: Scheme, dtype: str) -> Tree:
    """Every adapter added into its base, which is in the codes of `scheme` again, from the sum
    rounded to `dtype`. One layer at a time is in floats. A UserError names a weight that no group
    divides."""

    def change(path: tuple, w: Any) -> Any:
        encode = scheme.of(path_of(path))
        if not isinstance(w, Lora):
            return w
        merge = _merge if encode is None else _merge_and_encode
        try:
            return merge(w, dtype, encode)
        except ValueError as error:
            raise UserError(f"{path_of(path)} cannot be quantized: {error}") from None

    return jax.tree.map_with_path(change, params, is_leaf=is_weight)


def _merge(w: Lora, dtype: str, encode: Any) -> Array:
    return dense(w).astype(dtype)


def _merge_and_encode(w: Lora, dtype: str, encode: Any) -> Any:
    def one(w: Lora) -> Any:
        return encode(dense(w).astype(dtype))

    return jax.jit(one)(w) if w.a.ndim == 2 else jax.jit(lambda w: jax.lax.map(one, w))(w)


@matmul.register(Merged)
def _merged_matmul(w: Merged, x: Array) -> Array:
    return matmul(x, dense(replace(w.base, key=None)).astype(jnp.dtype(w.dtype)))
