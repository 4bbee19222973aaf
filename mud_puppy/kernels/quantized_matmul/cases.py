"""Every tuned configuration as a unit that tools/rocm_table.py compiles without a card."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import encode
from mud_puppy.kernels.quantized_matmul import KERNELS
from mud_puppy.kernels.quantized_matmul import plan as plans

OUT, IN = 4096, 14336
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4 double": {"format": "nf4", "double": True},
    "mxfp4": {"format": "mxfp4"},
    "int4": {"format": "int4"},
    "int4 zero points 32": {"format": "int4", "group": 32, "zero_points": True},
    "int8": {"format": "int8"},
    "fp8_e4m3fn": {"format": "fp8_e4m3fn"},
}
ROWS = {"nf4": (1, 16, 32, 64, 128), "mxfp4": (1, 16, 64), "int4": (1, 16, 64)}


def rocm_cases(arch: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The same for every architecture; the tiles come from its own entry of the table."""
    return [
        (f"{plans.OP} {name} x{rows}", f"{__name__}:unit", {"name": name, "rows": rows})
        for name in VARIANTS
        for rows in ROWS.get(name, (16, 64))
    ]


def unit(
    name: str, rows: int, tiles: dict[str, int] | None = None
) -> tuple[Callable, tuple[Any, ...]]:
    """(function, argument shapes) of one case, with these tiles in the place of the table's."""
    weight = jax.ShapeDtypeStruct((OUT, IN), jnp.float32)
    q = jax.eval_shape(lambda w: encode.quantize(w, **VARIANTS[name]), weight)
    x = jax.ShapeDtypeStruct((rows, IN), jnp.bfloat16)
    plan = plans.plan(x, q, tiles)
    assert not isinstance(plan, str), plan
    return lambda x, q: KERNELS[plan.kernel].product(plan, x, q), (x, q)
