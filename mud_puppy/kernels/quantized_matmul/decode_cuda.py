"""`decode.planes` in PTX: a 32-bit register holds two words, an element of each plane two numbers.

4-bit tables: shared memory holds the pair of numbers of every byte, once for each of its 32 banks,
so that no two lanes meet; a load fetches two weights. int4: the code becomes the low bits of the
number 128 (float16: 1024), whose unit is one. The scale is rounded to x's dtype and multiplied on,
two weights at a time.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels import formats
from mud_puppy.kernels import pallas as pl

NIBBLES = (4, 0, 12, 8)
TABLE, TABLE_BYTES = "mud_puppy_pairs", 256 * 32 * 4
TABLES = {"nf4": formats.NF4, "mxfp4": formats.E2M1}
FLOAT8 = {  # places to shift a magnitude of bfloat16 (float16) left, power of two that is left over
    "fp8_e4m3fn": ((4, 120), (7, 8)), "fp8_e5m2": ((5, 112), (8, 0)),
    "fp8_e4m3fnuz": ((4, 119), (7, 7)), "fp8_e5m2fnuz": ((5, 111), (8, -1)),
}  # fmt: skip


def planes(words: Any, format: str, dtype: Any, scales: Any, zeros: Any, minimum: Any) -> list[Any]:
    half = jnp.dtype(dtype)
    n = 4 if format in formats.PACKED else 2
    # Only loaded tiles, no constants: Triton then brings the words to the matrix instruction's
    # layout and decodes there; with a constant among them it would move decoded numbers.
    offset = None if zeros is None else -unit(half) - zeros
    given = [a for a in (offset, scales, minimum) if a is not None]
    args = [words, *(jnp.broadcast_to(a.astype(half), words.shape) for a in given)]
    names = iter([f"${n + i}" for i in range(len(args))])
    word = next(names)
    if format in TABLES:
        text = ".reg .b32 place; mov.u32 place, %laneid; shl.b32 place, place, 2;\n"
        text += pairs([f"v{e}" for e in range(4)], word, "place")
    elif format == "int4":
        middle = 0 if minimum is not None else 8
        text = f".reg .b32 offset; mov.b32 offset, {pair(-unit(half) - middle, half)};\n"
        text += _int4(word, half, "offset" if offset is None else next(names))
    elif format == "int8":
        text = _int8(word, half)
    else:
        text = _float8(word, format, half)
    scale = None if scales is None else next(names)
    extra = "zero" if minimum is None else next(names)
    for e in range(n):
        text += fma(f"${e}", f"v{e}", scale, extra, half) if scale else f"mov.b32 ${e}, v{e};\n"
    head = "".join(f".reg .b32 v{e}; " for e in range(n)) + ".reg .b32 one, zero;\n"
    head += f"mov.b32 one, {pair(1.0, half)}; mov.b32 zero, {pair(-0.0, half)};\n"
    constraints = ",".join(["=r"] * n + ["r"] * len(args))
    return pl.inline_asm("{ " + head + text + "}", args, constraints, 2, [half] * n)


def floats(words: Any, format: str) -> list[Any]:
    """The planes of a 4-bit format without its scale, as float32 tiles; int4 around 8."""
    table = TABLES.get(format, np.arange(16) - 8)
    bits = [int(b) for b in np.asarray(table, np.float32).view(np.uint32)]
    text = ".reg .b32 lane, lut, w, a; .reg .pred p;\n"
    text += f"mov.u32 lane, %laneid; and.b32 lane, lane, 15; mov.b32 lut, {bits[0]};\n"
    for code in range(1, 16):
        text += f"setp.eq.u32 p, lane, {code}; selp.b32 lut, {bits[code]}, lut, p;\n"
    for e, shift in enumerate(NIBBLES):
        for j in range(2):
            text += (
                f"shr.u32 w, $8, {shift + 16 * j}; {_FETCH.format('a')} mov.b32 ${2 * e + j}, a;\n"
            )
    constraints = ",".join(["=f"] * 8 + ["r"])
    return pl.inline_asm("{ " + text + "}", [words], constraints, 2, [jnp.float32] * 4)


def table(format: str, half: Any, lane: Any) -> Any:
    """Fills the table of pairs; returns each lane's place in a row of it, int32.

    `lane` is any tile [warps, 32]. The result must reach the kernel's: what is not used is dropped.
    The table is declared in the kernel's outermost scope, where `pairs` finds it by its name.
    """
    warps = lane.shape[0]
    text = f".shared .align 128 .b8 {TABLE}[{TABLE_BYTES}];\n{{ .reg .b32 byte, row, part;\n"
    text += _lane_value(TABLES[format], half)
    for first in range(0, 256, 32 * warps):
        # A thread writes the row of one byte, in an order that spreads over the banks.
        text += f"mov.u32 byte, %tid.x; add.u32 byte, byte, {first}; and.b32 byte, byte, 255;\n"
        text += "shr.u32 a, byte, 4; shfl.sync.idx.b32 a, lut, a, 0x100F, -1;\n"
        text += "shfl.sync.idx.b32 b, lut, byte, 0x100F, -1; prmt.b32 a, a, b, 0x5410;\n"
        text += f"shl.b32 row, byte, 7; mov.b32 b, {TABLE}; add.u32 row, row, b;\n"
        for i in range(8):
            text += f"add.u32 part, byte, {i}; and.b32 part, part, 7; shl.b32 part, part, 4;\n"
            text += "add.u32 part, part, row; st.shared.v4.b32 [part], {a, a, a, a};\n"
    text += "bar.sync 0; mov.u32 $0, %laneid; shl.b32 $0, $0, 2; }"
    return pl.inline_asm(text, [lane], "=r,r", 1, [jnp.int32], pure=False)[0]


def pairs(to: list[str], word: str, place: str) -> str:
    """The numbers of a word's bytes; `place` is the lane's in a row of the table."""
    text = f"{{ .reg .b32 at, base; mov.b32 base, {TABLE};\n"
    for i, register in enumerate(to):
        shift = 8 * i - 7  # a row of the table is 2^7 bytes
        text += f"shr.u32 at, {word}, {shift}; " if shift > 0 else f"shl.b32 at, {word}, {-shift}; "
        text += f"lop3.b32 at, at, 0x7F80, {place}, 0xEA; "  # a & b | c
        text += f"add.u32 at, at, base; ld.shared.b32 {register}, [at];\n"
    return text + "}\n"


# Of the index in w the shuffle sees the low four bits, for the segments are of 16 lanes.
_FETCH = "shfl.sync.idx.b32 {}, lut, w, 0x100F, -1;"


def _lane_value(table: Any, half: Any) -> str:
    """lut: the number of code laneid mod 16, by selecting bytes."""
    bits = np.asarray(table).astype(half).view(np.uint16)
    text = ".reg .b32 lane, low, high, mask, a, b, upper, lut;\n"
    text += "mov.u32 lane, %laneid; and.b32 low, lane, 7; shr.u32 mask, lane, 1;\n"
    text += "and.b32 mask, mask, 4; prmt.b32 mask, 0, -1, mask;\n"
    for name, shift in (("upper", 8), ("lut", 0)):
        t = [int(w) for w in ((bits >> shift) & 255).astype(np.uint8).view(np.uint32)]
        text += f"prmt.b32 a, {t[0]}, {t[1]}, low; prmt.b32 b, {t[2]}, {t[3]}, low;\n"
        text += f"lop3.b32 {name}, b, a, mask, 0xE4;\n"  # mask ? b : a
    return text + "prmt.b32 lut, lut, upper, 0x4040;\n"


def _int4(word: str, half: Any, offset: str) -> str:
    text = ".reg .b32 w;\n"
    for e, shift in enumerate(NIBBLES):
        text += f"shr.u32 w, {word}, {shift}; "
        text += f"lop3.b32 w, w, 0x000F000F, {pair(unit(half), half)}, 0xEA;\n"  # a & b | c
        text += fma(f"v{e}", "w", "one", offset, half)
    return text


def _int8(word: str, half: Any) -> str:
    """16 (h - 8) + l of the two nibbles of the byte with its sign bit turned."""
    one = pair(unit(half), half)
    text = ".reg .b32 w, h, l, sixteen, less, eight;\n"
    text += f"mov.b32 sixteen, {pair(16.0, half)}; mov.b32 less, {pair(-unit(half), half)};\n"
    text += f"mov.b32 eight, {pair(-unit(half) - 8, half)};\n"
    for e, shift in enumerate((0, 8)):
        text += f"shr.u32 w, {word}, {shift}; xor.b32 w, w, 0x00800080;\n"
        text += f"lop3.b32 l, w, 0x000F000F, {one}, 0xEA; shr.u32 w, w, 4;\n"
        text += f"lop3.b32 h, w, 0x000F000F, {one}, 0xEA;\n"
        text += fma("l", "l", "one", "less", half) + fma("h", "h", "one", "eight", half)
        text += fma(f"v{e}", "h", "sixteen", "l", half)
    return text


def _float8(word: str, format: str, half: Any) -> str:
    """The magnitude's bits at their place, then times what the exponents' biases differ by."""
    shift, power = FLOAT8[format][half == jnp.float16]
    text = f".reg .b32 w, s, power; mov.b32 power, {pair(2.0**power, half)};\n"
    for e, at in enumerate((0, 8)):
        text += f"shr.u32 w, {word}, {at}; shl.b32 s, w, 8; and.b32 s, s, 0x80008000;\n"
        text += f"and.b32 w, w, 0x007F007F; shl.b32 w, w, {shift}; or.b32 w, w, s;\n"
        text += fma(f"v{e}", "w", "power", "zero", half)
    return text


def fma(to: str, a: str, b: str, c: str, half: Any) -> str:
    kind = "bf16x2" if half == jnp.bfloat16 else "f16x2"
    return f"fma.rn.{kind} {to}, {a}, {b}, {c};\n"


def unit(half: Any) -> float:
    """The power of two from which on the numbers are the integers."""
    return 128.0 if half == jnp.bfloat16 else 1024.0


def pair(value: float, half: Any) -> int:
    bits = int(np.asarray(value).astype(half).view(np.uint16))
    return bits << 16 | bits
