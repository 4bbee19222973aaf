"""The cross-entropy kernels as units that can be compiled without data or card.

`case(...)` is what `mud_puppy.rocm.compile.Unit` names; `rocm_cases(arch)` lists the tuned ones.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.cross_entropy import pallas
from mud_puppy.kernels.cross_entropy.pallas import Tiles
from mud_puppy.kernels.cross_entropy.stats import Shape

FUNCTION = "mud_puppy.kernels.cross_entropy.cases:case"
KERNELS = ("score", "score_write", "slope")


def case(
    kernel: str, tile: dict[str, int] | None = None, dtype: str = "bfloat16", tokens: int = 512
) -> tuple[Any, tuple]:
    """(callable, its arguments as shapes) of one of KERNELS, for a head of 128,256 x 4,096."""
    x, w = (jax.ShapeDtypeStruct((n, 4096), jnp.dtype(dtype)) for n in (tokens, 128256))
    y = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    tiles = Tiles(**tile) if tile else pallas.tuned_tiles(kernel.removesuffix("_write"), x.dtype)
    if kernel == "slope":
        weights = jax.ShapeDtypeStruct((5, tokens), jnp.float32)
        return lambda x, w, y, g: pallas.slope(x, w, y, g, Shape(), tiles), (x, w, y, weights)

    def score(x: Any, w: Any, y: Any) -> Any:
        found = pallas.score(x, w, y, Shape(), tiles, write=kernel == "score_write")
        return [part for part in found if part is not None]

    return score, (x, w, y)


def rocm_cases(arch: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, function, arguments) of a `Unit` for every tuned configuration of half precision."""
    del arch  # the target says it when the unit is built
    return [(f"cross_entropy {kernel}", FUNCTION, {"kernel": kernel}) for kernel in KERNELS]
