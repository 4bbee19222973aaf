"""Codes through a table of 16 numbers on AMD, where v_perm_b32 selects bytes from eight.

A table of 16-bit numbers is four registers of upper bytes and four of lower ones. Both halves of it
are asked for the three lower bits of a code, and the fourth bit chooses between the answers: 25
instructions for 8 codes, where comparing takes 30 for one.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels import target

PLANES, TEMPORARIES = 4, 6


def held(words: Any) -> Any:
    """The tile as it is, in the layout it was loaded in.

    Left alone, the compiler brings codes to the layout of the matrix instruction's left operand and
    decodes there: twice each on RDNA3, which wants that operand once in each half of a wave, and
    once in every wave that shares the rows where x is wide.
    """
    return pl.inline_asm("v_mov_b32 $0, $1", [words], "=v,v", 2, [words.dtype], pure=False)[0]


def table(words: Any, values: np.ndarray, dtype: Any) -> list[Any]:
    """Four planes of `dtype` from an int16 tile of four codes each."""
    bits = np.asarray(values).astype(dtype).view(np.uint16)
    constants = [
        int(w) for shift in (8, 0) for w in ((bits >> shift) & 255).astype(np.uint8).view(np.int32)
    ]
    constants += [0x06020400, 0x07030501]  # interleave bytes 0 and 2, bytes 1 and 3
    tiles = [jnp.full(words.shape, c, jnp.int32) for c in constants]
    # The text has two words in one register; an int32 tile has two registers for them.
    dtypes = [jnp.int16] * PLANES + [jnp.int32] * (TEMPORARIES // 2)
    constraints = ["=&v"] * (PLANES + TEMPORARIES) + ["v"] * (1 + 2 * len(tiles))
    out = pl.inline_asm(_text(), [words, *tiles], ",".join(constraints), 2, dtypes)
    return [lax.bitcast_convert_type(o, dtype) for o in out[:PLANES]]


def _text() -> str:
    first = PLANES + TEMPORARIES
    word = f"${first}"
    upper, lower = ([f"${first + 1 + 2 * (4 * i + j)}" for j in range(4)] for i in range(2))
    even, odd = (f"${first + 1 + 2 * i}" for i in (8, 9))
    low, mask, a, b, h, _ = (f"${PLANES + i}" for i in range(TEMPORARIES))
    lines = []
    for shift, planes in ((4, ("$0", "$2")), (0, ("$1", "$3"))):
        lines += [
            f"v_lshrrev_b32 {a}, {shift}, {word}",
            f"v_and_b32 {low}, 0x07070707, {a}",
            f"v_lshrrev_b32 {mask}, 3, {a}",
            f"v_and_b32 {mask}, 0x01010101, {mask}",
            # Selectors 12 and 13 stand for the bytes 0 and 255.
            f"v_or_b32 {mask}, 0x0c0c0c0c, {mask}",
            f"v_perm_b32 {mask}, {mask}, {mask}, {mask}",
        ]
        for to, t in ((h, upper), (low, lower)):
            lines += [
                f"v_perm_b32 {a}, {t[1]}, {t[0]}, {low}",
                f"v_perm_b32 {b}, {t[3]}, {t[2]}, {low}",
                f"v_bfi_b32 {to}, {mask}, {b}, {a}",
            ]
        lines += [
            f"v_perm_b32 {p}, {h}, {low}, {s}" for p, s in zip(planes, (even, odd), strict=True)
        ]
    if target.current().arch.startswith("gfx9"):
        # CDNA wants two wait states between a vector instruction and an MFMA that reads it; LLVM
        # counts them, but does not look into this text.
        lines.append("s_nop 1")
    return "\n".join(lines)
