"""fp8 training: the linears of the layers multiply in float8 (`kernels.fp8`); all else stays.

A base under adapters is stored once as float8 codes, a byte a weight, and its codes are multiplied
as they are. A weight that trains stays a float32 master that every step rounds anew. Embedding,
head, norms and the adapters' own small products are untouched. What computes is the chip's float8
unit, or nothing does: there is no second product beside it.
"""

import logging
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, matmul, target
from mud_puppy.kernels.formats import FP8, sliced
from mud_puppy.kernels.fp8 import OCP, Float8, cast, float8, fp8_codes_matmul, fp8_matmul, scale_of
from mud_puppy.weights.leaf import Fp8, Lora, is_weight
from mud_puppy.weights.tree import Tree, is_expert, map_modules, module_names

log = logging.getLogger("mud_puppy")


def fp8_types(emulated: bool = False) -> Float8:
    """The current target's float8; UserError where it has none and `emulated` is not asked for."""
    chip = target.current()
    types = float8(chip)
    if types is None and not emulated:
        raise UserError(
            f"precision fp8: {chip.arch} has no float8 products; use --precision bf16, or "
            "--precision fp8-emulated for the same roundings at bfloat16's speed"
        )
    return replace(types or OCP, emulated=emulated)


def fp8(params: Tree, emulated: bool = False) -> Tree:
    """Every linear of the layers with float8 products; under adapters the base becomes codes.

    Experts keep their own products, which one line of the log says. A Quantized base must be of the
    target's own float8. UserError as of `fp8_types`.
    """
    types = fp8_types(emulated)
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    frozen = any(isinstance(leaf, Lora) for leaf in leaves)

    if any(is_expert(name) for name in module_names(params)):
        log.warning("precision fp8: the experts' products stay bfloat16's; there is no grouped one")

    def change(names: list[str], w: Any) -> Any:
        changes = ".layers." in names[0] and not is_expert(names[0])
        return _changed(names[0], w, types, frozen) if changes else w

    return map_modules(change, lambda name: None, params)


def strip_fp8(params: Tree) -> Tree:
    """The arrays and codes under `fp8`, for saving and generating; shares every buffer."""
    return jax.tree.map(_stripped, params, is_leaf=is_weight)


def with_scales(params: Tree) -> Tree:
    """Finds the scales of all weights that train, once a step and outside the scan over layers."""
    return jax.tree.map(_scaled, params, is_leaf=is_weight)


def fp8_codes(w: Array, types: Float8 = OCP) -> Quantized:
    """w [..., out, in] in float8 with one scale, a power of two, for each matrix."""
    scales = scale_of(w, types.forward, axes=(-2, -1))[..., None, None]
    codes = jax.lax.bitcast_convert_type(cast(w, scales, types.forward), jnp.uint8)
    return Quantized(codes, scales, format=_format(types), dtype=jnp.dtype(w.dtype))


def _changed(name: str, w: Any, types: Float8, frozen: bool) -> Any:
    if isinstance(w, Lora):
        return replace(w, base=_changed(name, w.base, types, frozen))
    if isinstance(w, Fp8):
        return w if isinstance(w.base, Quantized) else _changed(name, w.base, types, frozen)
    if isinstance(w, Quantized):
        if w.format != _format(types) or w.group != w.shape[-1]:
            raise UserError(
                f"precision fp8: '{name}' is stored as {w.format}, and only {_format(types)} with "
                "one scale a row can be multiplied as it is; take another precision"
            )
        # One scale a matrix is a power of two here; others are written out for each row.
        scales = jnp.broadcast_to(w.scales, (*w.shape[:-1], 1))
        return Fp8(replace(w, scales=scales), types=types)
    if is_weight(w):
        raise UserError(
            f"precision fp8: '{name}' is a {type(w).__name__}, which has products of its own; take "
            "another precision"
        )
    return Fp8(_jitted_codes(w, types) if frozen else w, types=types)


def _format(types: Float8) -> str:
    return next(name for name, dtype in FP8.items() if jnp.dtype(dtype) == types.forward)


# Compiled: step by step, float32 copies of the whole stack would be made.
_jitted_codes = jax.jit(fp8_codes, static_argnums=1)


def _stripped(w: Any) -> Any:
    if isinstance(w, Lora):
        return replace(w, base=_stripped(w.base))
    return w.base if isinstance(w, Fp8) else w


def _scaled(w: Any) -> Any:
    if isinstance(w, Lora):
        return replace(w, base=_scaled(w.base))
    if not isinstance(w, Fp8) or isinstance(w.base, Quantized):
        return w
    base = jax.lax.stop_gradient(w.base)
    return replace(w, scale=scale_of(base, w.types.forward, axes=(-2, -1)))


@matmul.register(Fp8)
def _fp8_matmul(w: Fp8, x: Array) -> Array:
    if not isinstance(w.base, Quantized):
        return fp8_matmul(x, w.base, w.scale, types=w.types)
    base = sliced(w.base)
    codes = jax.lax.bitcast_convert_type(base.codes, jnp.dtype(w.types.forward))
    return fp8_codes_matmul(x, codes, base.scales, types=w.types)
