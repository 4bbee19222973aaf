"""What a weight can be: an array, or a struct that knows its own format.

    Weight = Array | Quantized | Lora        (FakeQuant joins with the quantization issue)

A layer never asks which one it has: `linear(x, w)` does. `Lora(base=Lora(...))` is a frozen adapter
under a new one; only the outermost adapter trains, and that not when it is marked `frozen`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax

from mud_puppy.kernels import Quantized


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


def is_weight(leaf: Any) -> bool:
    """For `tree.map(..., is_leaf=is_weight)`: stops at a weight instead of entering it."""
    return isinstance(leaf, Lora | Quantized)


def base_of(weight: Any) -> Any:
    """The array or Quantized under all adapters."""
    return base_of(weight.base) if isinstance(weight, Lora) else weight
