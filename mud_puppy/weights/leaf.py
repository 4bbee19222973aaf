"""What a weight can be: an array, or a struct that knows its own format.

    Weight = Array | Quantized | Int8Dynamic | Lora | FakeQuant | Fp8

A layer never asks which one it has: `linear(x, w)` does. `Lora(base=Lora(...))` is a frozen adapter
under a new one; only the outermost adapter trains, and that not when it is marked `frozen`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax

from mud_puppy.kernels import Quantized
from mud_puppy.kernels.fp8 import Float8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """`base + scale * b @ a` (LoRA, arXiv:2106.09685), with DoRA's magnitude (arXiv:2402.09353).

    Shapes, each behind the leading layer axis when the weight is stacked:

        base       [out, in] array, Quantized, or another Lora
        a, b       float32 [r, in], [out, r]
        scale      float32 [], alpha / r, or alpha / sqrt(r) for rsLoRA
        magnitude  float32 [out] or None
        key        PRNG key [] or None; when set, the adapter's input is dropped out with rate
                   `dropout` (a static float)
        frozen     static: this adapter does not train, and has no dropout (`freeze_lora`)
    """

    # Any: JAX rebuilds leaves with tracers, specs and None; checks belong to `add_lora`.
    base: Any
    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    key: Any = None
    dropout: float = field(default=0.0, metadata={"static": True})
    frozen: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8:
    """A weight whose products are float8's (`kernels.fp8`); made by `fp8`.

    Shapes, each behind the leading layer axis when the weight is stacked:

        base    float array [..., out, in] that trains and is rounded in every step, or a Quantized
                of `types.forward` whose codes are multiplied as they are
        scale   float32 [...], the scale of an array base in this step (`with_scales`), or None to
                find it at each product
        types   static
    """

    base: Any
    scale: Any = None
    types: Float8 = field(default=Float8("float8_e4m3fn", "float8_e5m2"), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuant:
    """A float weight whose products are with its values on a grid (`rounding`); `fake_quant` makes
    it.

        base         float array [..., out, in], or a Lora over one: the merged weight is rounded
        range   float32 [..., out, groups], learned, or None: from the weight at each product
        format       static: "int8" or "int4"
        group        static: inputs that share a scale, None for a row
        activations  static: "none", or "int8": each token's input is rounded too
    """

    base: Any
    range: Any = None
    format: str = field(default="int8", metadata={"static": True})
    group: int | None = field(default=None, metadata={"static": True})
    activations: str = field(default="none", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Dynamic:
    """A Quantized of int8 or int4 whose input is rounded to int8, a scale for each token, so that
    the products are of integers (`int8_dynamic`)."""

    base: Any


def is_weight(leaf: Any) -> bool:
    """For `tree.map(..., is_leaf=is_weight)`: stops at a weight instead of entering it."""
    return isinstance(leaf, Lora | FakeQuant | Fp8 | Int8Dynamic | Quantized)


def base_of(weight: Any) -> Any:
    """The array or Quantized under all adapters."""
    wrapped = isinstance(weight, Lora | FakeQuant | Fp8 | Int8Dynamic)
    return base_of(weight.base) if wrapped else weight
