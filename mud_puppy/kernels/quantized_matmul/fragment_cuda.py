"""The inner product of `fragment` in PTX: codes to operands of mma.m16n8k16, and the products."""

from typing import Any

import jax.numpy as jnp

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.quantized_matmul import decode_cuda

SUMS = "mud_puppy_sums"
PAIRS = 8  # of a lane in a span: two words of codes


def span(
    format: str, half: Any, table: Any, codes: Any, scales: Any, zeros: Any, xs: Any, sums: Any
) -> list[Any]:
    """sums + scale * (16 rows x 64 inputs of the weight) @ x, four tiles for each 8 rows of x.

    codes: two words of row g, two of row g + 8. scales, zeros: of the two rows; zeros int32 or
    None. xs: for each 8 rows of x 8 words. sums: row g with x's rows 2 t and 2 t + 1, then g + 8.
    """
    tiles = [
        [*codes[0], *codes[1]],
        scales,
        zeros or [],
        *xs,
        sums,
        [] if table is None else [table],
    ]
    numbers = iter(range(len(sums), 10_000))
    names = [[f"${next(numbers)}" for _ in group] for group in tiles]
    words, scale, zero, *x, total, place = names
    text = f".reg .b32 v, offset, one; mov.b32 one, {decode_cuda.pair(1.0, half)}; "
    text += _registers("b32", [f"a{r}{j}" for r in range(2) for j in range(PAIRS)])
    for r in range(2):
        own = words[2 * r : 2 * r + 2]
        text += _int4(r, own, zero[r : r + 1], half) if format == "int4" else _table(r, own, *place)
    for i, of_x in enumerate(x):
        if format == "int4":
            ordered = [f"x{i}{j}" for j in range(PAIRS)]
            text += _registers("b32", ordered) + _apart(of_x, ordered)
            of_x = ordered
        text += _products(i, of_x, half)
        for j, at in enumerate(range(4 * i, 4 * i + 4)):
            text += f"fma.rn.f32 ${at}, c{i}{j}, {scale[j // 2]}, {total[at]};\n"
    constraints = ["=&f"] * len(sums)
    constraints += ["f" if group in (scale, total) else "r" for group in names for _ in group]
    args = [a for group in tiles for a in group]
    return pl.inline_asm(
        "{ " + text + "}", args, ",".join(constraints), 1, [jnp.float32] * len(sums), pure=False
    )


def added(tiles: list[Any], bits: list[int], table: Any) -> list[Any]:
    """`fragment._added`: float32 sums over the warps and over lanes that differ in `bits`.

    Through shared memory, at the end of the kernel: Triton would wait for all warps at each value.
    """
    warps, count = tiles[0].shape[0], len(tiles)
    outs = -(-count // warps)
    row = 128 * warps  # bytes of a tile
    text = "{ .reg .b32 at, own, warp; .reg .f32 sum, next;\n"
    if table is None:
        text += f".shared .align 16 .b8 {SUMS}[{count * row}]; mov.b32 own, {SUMS};\n"
    else:  # its memory is free by now
        text += f"bar.sync 0; mov.b32 own, {decode_cuda.TABLE};\n"
    text += "mov.u32 at, %tid.x; shr.u32 warp, at, 5;\n"
    text += "shl.b32 at, at, 2; add.u32 at, at, own;\n"
    for j in range(count):
        text += f"st.shared.f32 [at + {j * row}], ${outs + j};\n"
    # From this warp's place in the first tile to the first warp's in the tile that is its own.
    text += f"shl.b32 own, warp, 7; sub.u32 at, at, own; and.b32 own, warp, {count - 1};\n"
    text += f"mad.lo.u32 at, own, {row}, at; bar.sync 0;\n"
    for i in range(outs):
        text += "mov.f32 sum, 0f00000000;\n"
        for u in range(warps):
            text += f"ld.shared.f32 next, [at + {i * warps * row + u * 128}]; "
            text += "add.f32 sum, sum, next;\n"
        for bit in bits:
            text += f"shfl.sync.bfly.b32 next, sum, {bit}, 0x1f, -1; add.f32 sum, sum, next;\n"
        text += f"mov.f32 ${i}, sum;\n"
    constraints = ",".join(["=&f"] * outs + ["f"] * count)
    return pl.inline_asm(text + "}", tiles, constraints, 1, [jnp.float32] * outs, pure=False)


def _table(r: int, words: list[str], place: str) -> str:
    """a{r}0 to 7: the pairs of numbers of the bytes of two words."""
    names = [f"a{r}{j}" for j in range(PAIRS)]
    return "".join(decode_cuda.pairs(names[4 * i : 4 * i + 4], words[i], place) for i in range(2))


def _int4(r: int, words: list[str], zero: list[str], half: Any) -> str:
    """a{r}0 to 7: of each word the numbers 0 and 4, 1 and 5, 2 and 6, 3 and 7, less the zero."""
    unit = decode_cuda.unit(half)
    text = f"mov.b32 offset, {decode_cuda.pair(-unit - (0 if zero else 8), half)};\n"
    for z in zero:  # its bits stand where those of the codes do
        text += f"mad.lo.u32 offset, {z}, 0x00010001, offset;\n"
    for j in range(PAIRS):
        word, shift = words[j // 4], decode_cuda.NIBBLES[j % 4]
        text += f"shr.u32 v, {word}, {shift}; "
        text += f"lop3.b32 v, v, 0x000F000F, {decode_cuda.pair(unit, half)}, 0xEA; "  # a & b | c
        text += decode_cuda.fma(f"a{r}{j}", "v", "one", "offset", half)
    return text


def _apart(words: list[str], ordered: list[str]) -> str:
    """Eight numbers of x in four words, paired as `_int4` pairs the weight's."""
    text = ""
    for j, to in enumerate(ordered):
        low, high = words[4 * (j // 4) + j % 4 // 2], words[4 * (j // 4) + j % 4 // 2 + 2]
        text += f"prmt.b32 {to}, {low}, {high}, {'0x7632' if j % 2 else '0x5410'};\n"
    return text


def _products(i: int, x: list[str], half: Any) -> str:
    """c{i}0 to 3: the sums over the span's 64 inputs, without its scale."""
    kind = "bf16" if half == jnp.bfloat16 else "f16"
    c = [f"c{i}{j}" for j in range(4)]
    text = _registers("f32", c)
    for j in range(0, PAIRS, 2):
        a = f"{{a0{j}, a1{j}, a0{j + 1}, a1{j + 1}}}, {{{x[j]}, {x[j + 1]}}}"
        start = ["0f00000000"] * 4 if j == 0 else c
        text += f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        text += f"{{{', '.join(c)}}}, {a}, {{{', '.join(start)}}};\n"
    return text


def _registers(kind: str, names: list[str]) -> str:
    return f".reg .{kind} {', '.join(names)};\n"
