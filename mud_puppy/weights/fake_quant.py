"""Quantization-aware training (QAT): linears whose forward pass sees the weights that will ship.

`fake_quant` wraps the linears of the layers; the step trains them as it trains any params, every
forward pass rounding the float weight to its grid and every backward pass looking through that
(`rounding`). `finish_fake_quant` replaces each by the codes and scales that it stood for.

Scales follow the weight ("dynamic") or are trained with it ("learned"). An exponential average of
ranges is not offered: it smooths what changes from batch to batch, and a weight's range, and with
activations per token theirs too, is known exactly at every step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.errors import UserError, nearest
from mud_puppy.kernels import Quantized, formats, matmul
from mud_puppy.weights.int8_dynamic import int8_dynamic
from mud_puppy.weights.leaf import FakeQuant, Lora, base_of, is_weight
from mud_puppy.weights.linear import dense
from mud_puppy.weights.lora import ALL_LINEAR, match_targets
from mud_puppy.weights.rounding import GRID, round_rows, weight_codes, widest_range
from mud_puppy.weights.tree import Tree, map_modules, module_names


def fake_quant(
    params: Tree,
    format: str = "int8",
    *,
    group: int | None = None,
    activations: str = "none",
    ranges: str = "dynamic",
    targets: str | Sequence[str] = ALL_LINEAR,
) -> Tree:
    """`params` with fake-quantized linears; under adapters, the merged weight is what is rounded.

    format: "int8" (codes -127..127) or "int4" (-8..7, zero 8 in `Quantized`). group: inputs that
    share a scale, None for a row. activations: "none", or "int8" for a scale each token. ranges:
    "dynamic" (the absmax of the moment), or "learned" (LSQ; starts there). targets: as of
    `add_lora`, in the layers. UserError for other values, rows that no group divides, weights
    without floats to train, and adapters with dropout, which a merged weight cannot have.
    """
    _check_one_of("format", format, tuple(GRID))
    _check_one_of("activations", activations, ("none", "int8"))
    if ranges == "ema":
        raise UserError(
            "qat ranges 'ema': a moving average would lag behind ranges that are known exactly at "
            "each step; use 'dynamic', or 'learned' to clip outliers"
        )
    _check_one_of("ranges", ranges, ("dynamic", "learned"))
    chosen = match_targets(module_names(params), targets, "qat")
    if outside := sorted(name for name in chosen if ".layers." not in name):
        raise UserError(f"qat target '{outside[0]}': only the linears of layers are quantized")

    def wrap(names: list[str], w: Any) -> Any:
        if names[0] not in chosen:
            return w
        _check(names[0], w, format, group)
        learned = _fresh_range(w, group) if ranges == "learned" else None
        return FakeQuant(w, learned, format, group, activations)

    return map_modules(wrap, chosen.__contains__, params)


def finish_fake_quant(params: Tree) -> Tree:
    """The codes and scales that the last forward pass used: `Quantized`, in `Int8Dynamic` where
    activations were rounded. Adapters are merged."""
    return jax.tree.map(_finished, params, is_leaf=is_weight)


def strip_fake_quant(params: Tree) -> Tree:
    """The float weights and adapters that train, without rounding; shares every buffer."""

    def strip(w: Any) -> Any:
        return w.base if isinstance(w, FakeQuant) else w

    return jax.tree.map(strip, params, is_leaf=is_weight)


@matmul.register(FakeQuant)
def _fake_quant_matmul(w: FakeQuant, x: Array) -> Array:
    return matmul(round_rows(x) if w.activations == "int8" else x, dense(w))


def _finished(w: Any) -> Any:
    if isinstance(w, Lora):
        return replace(w, base=_finished(w.base))
    if not isinstance(w, FakeQuant):
        return w
    q = _encode(w)
    return int8_dynamic(q) if w.activations == "int8" else q


# Compiled, one layer of a stack after the other: float32 copies are of one layer only.


@jax.jit
def _encode(w: FakeQuant) -> Quantized:
    if base_of(w).ndim > 2:
        return jax.lax.map(_encode, w)
    codes, scales = weight_codes(dense(w.base), w.range, w.format, w.group)
    dtype = base_of(w).dtype
    if w.format == "int4":
        return formats.int4((codes + 8).astype(jnp.uint8), scales, dtype=dtype)
    return Quantized(codes.astype(jnp.int8), scales, format="int8", dtype=jnp.dtype(dtype))


@partial(jax.jit, static_argnums=1)
def _fresh_range(w: Any, group: int | None) -> Array:
    if base_of(w).ndim > 2:
        return jax.lax.map(lambda layer: _fresh_range(layer, group), w)
    return widest_range(dense(w), group)


def _check(name: str, w: Any, format: str, group: int | None) -> None:
    if isinstance(w, FakeQuant):
        raise UserError(f"qat: '{name}' is fake-quantized already")
    if isinstance(w, Quantized) or not (isinstance(w, Lora) or base_of(w) is w):
        raise UserError(f"qat: '{name}' is stored in codes, which do not train; add adapters first")
    if isinstance(w, Lora) and w.dropout and not w.frozen:
        raise UserError(
            f"qat: the adapter of '{name}' has dropout, but what is rounded is the merged weight, "
            "which has no adapter's input to drop out: set lora_dropout to 0"
        )
    size = base_of(w).shape[-1]
    if group is not None and (group < 2 or group % 2 or size % group):
        fitting = [g for g in (32, 64, 128, 256) if size % g == 0]
        raise UserError(
            f"qat: rows of {size} ('{name}') are not whole groups of {group}; groups that fit: "
            f"{', '.join(map(str, fitting)) or 'none'}, or format int8 without groups"
        )
    if format == "int4" and size % 2:
        raise UserError(f"qat: rows of {size} ('{name}') are odd, and int4 packs pairs; use int8")


def _check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"qat {name} '{value}' is not one of {', '.join(choices)}.{nearest(value, choices)}"
        )
