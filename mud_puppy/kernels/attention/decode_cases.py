"""The flash decode kernel as units that can be compiled without data or card.

`case(...)` is what `mud_puppy.rocm.compile.Unit` names; `rocm_cases(arch)` lists the tuned ones.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.attention import decode_pallas
from mud_puppy.kernels.attention.decode_pallas import Cache

FUNCTION = "mud_puppy.kernels.attention.decode_cases:case"
KINDS = ("half", "int8", "paged")


def case(kind: str, width: int, tile: dict[str, int] | None = None, tokens: int = 1) -> tuple:
    """(callable, its arguments as shapes): 32 heads on 8, 8 rows of 32,768 slots.

    kind: one of KINDS, or "float32".
    """
    B, S, K, page = 8, 32768, 8, 128
    shape = (B * S // page, page, K, width) if kind == "paged" else (B, S, K, width)
    dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    cache = jax.ShapeDtypeStruct(shape, jnp.int8 if kind == "int8" else dtype)
    scales = jax.ShapeDtypeStruct(shape[:-1], jnp.float32) if kind == "int8" else None
    table = jax.ShapeDtypeStruct((B, S // page), jnp.int32) if kind == "paged" else None
    q = jax.ShapeDtypeStruct((B, tokens, 32, width), dtype)
    positions = jax.ShapeDtypeStruct((B, tokens), jnp.int32)

    def decode(q: Any, cache: Cache, positions: Any) -> Any:
        options: dict[str, Any] = dict(window=None, scale=width**-0.5, softcap=None)
        return decode_pallas.attention(q, cache, positions, tiles=tile, **options)

    return decode, (q, Cache(cache, cache, scales, scales, table), positions)


def rocm_cases(arch: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, function, arguments) of a `Unit` for every tuned configuration of half precision."""
    del arch  # the target says it when the unit is built
    return [
        (f"decode_attention {kind} head {width}", FUNCTION, {"kind": kind, "width": width})
        for kind in KINDS
        for width in (64, 128, 256)
    ]
