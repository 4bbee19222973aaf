"""The grouped matmul kernels as units that can be compiled without data or card.

`case(...)` is what `mud_puppy.rocm.compile.Unit` names; `rocm_cases(arch)` lists the tuned ones.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.grouped_matmul import pallas

FUNCTION = "mud_puppy.kernels.grouped_matmul.cases:case"
KERNELS = ("forward", "d_x", "d_w")


def case(
    kernel: str, tile: dict[str, Any] | None = None, dtype: str = "bfloat16"
) -> tuple[Any, tuple]:
    """(callable, its arguments as shapes) of one of KERNELS: 8 experts of 14,336 x 4,096."""
    E, M, N, K = 8, 16384, 14336, 4096
    x, dy, w = (jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for s in ((M, K), (M, N), (E, N, K)))
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    tiles = pallas.tiles_of(tile) if tile else pallas.tuned_tiles(kernel, x.dtype)
    if kernel == "d_w":
        return lambda *args: pallas.weight_gradient(*args, tiles=tiles), (x, dy, w, sizes)
    transpose = kernel == "d_x"
    a = dy if transpose else x
    return lambda *args: pallas.grouped(*args, transpose=transpose, tiles=tiles), (a, w, sizes)


def rocm_cases(arch: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, function, arguments) of a `Unit` for every tuned configuration of half precision."""
    del arch  # the target says it when the unit is built
    return [(f"grouped_matmul {kernel}", FUNCTION, {"kernel": kernel}) for kernel in KERNELS]
