"""The attention kernels as units that can be compiled without data or card: for tuning, tables.

`case(...)` is what `mud_puppy.rocm.compile.Unit` names; `rocm_cases(arch)` lists the tuned ones.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import target, tuned
from mud_puppy.kernels.attention import flash, prepare
from mud_puppy.kernels.attention.plan import Options

FUNCTION = "mud_puppy.kernels.attention.cases:case"
# Widths (D, Dv) whose tiles the table holds, by the table's name for them.
HEADS = {64: (64, 64), 128: (128, 128), 192: (192, 128), 256: (256, 256)}


def case(
    kernel: str,
    width: int,
    dtype: str = "bfloat16",
    tile: dict[str, int] | None = None,
    together: bool = False,
    tokens: int = 2048,
) -> tuple[Any, tuple, int]:
    """(callable, its arguments as shapes, passes of the loop over columns): one of the four passes,
    causal, eight heads on eight.

    Without a tile the tuned one; with one, `together` asks for one kernel for d_keys and d_values.
    """
    D, Dv = HEADS[width]
    shapes = [(1, tokens, 8, D), (1, tokens, 8, D), (1, tokens, 8, Dv)]
    q, k, v = (jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for s in shapes)
    tiles = prepare.tuned_tiles(q, v)
    if tile is not None:
        items = tuple(sorted(tile.items()))
        tiles = prepare.Tiles(items, items, items, None if together else items)
    if kernel == "d_values" and tiles.d_values is None:
        kernel = "d_keys"
    options = Options(causal=True, window=None, scale=D**-0.5)
    given = flash.one_pass(kernel, options, tiles)
    d_out = jax.ShapeDtypeStruct(v.shape, v.dtype)
    row = jax.ShapeDtypeStruct((1, 8, tokens), jnp.float32)
    chunk = dict(getattr(tiles, kernel)).get("chunk", 0)
    turns = max(1, D // min(chunk, D & -D)) if chunk else 1  # of the loop over columns
    return given, (q, k, v) if kernel == "forward" else (q, k, v, d_out, row, row), turns


def rocm_cases(arch: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, function, arguments) of a `Unit` for every tuned configuration of half precision."""
    with target.use(target.Target("rocm", arch)):
        return [
            (f"flash_attention {kernel} head {width}", FUNCTION, {"kernel": kernel, "width": width})
            for kernel in prepare.PASSES
            for width in HEADS
            if tuned.tiles("flash_attention", f"{kernel} half {width}")  # else d_keys gives it
        ]
