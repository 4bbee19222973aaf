"""Choose the attention kernels' tiles for AMD cards by reading what the compiler makes of them.

    python tools/tune_attention.py gfx1100 --kernel forward d_keys --width 128
    python tools/tune_attention.py gfx1100 gfx1201 gfx90a gfx942 gfx950 --write

Every candidate is compiled; those with spills, too much LDS, or LDS loads of two bytes in a loop
with matrix products are out where any other is left. The rest are ordered by llvm-mca's cycles for
a unit of work (one 16x16x16 product) of a pass over the loop of blocks without mask, in the waves
that share a SIMD. Nothing is timed: no card is here. Needs what tools/rocm_table.py needs.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tune_tiles import run, write

from mud_puppy.kernels.attention.cases import FUNCTION, HEADS
from mud_puppy.kernels.attention.prepare import PASSES
from mud_puppy.rocm import assembly, binary, instructions, targets
from mud_puppy.rocm.compile import CompileError, Compiler, Unit

OP = "flash_attention"
ARCHS = ["gfx1100", "gfx1201", "gfx90a", "gfx942", "gfx950"]
METHOD = (
    "tools/tune_attention.py: no spills, LDS in bounds, no two-byte LDS loads in the loops, then "
    "llvm-mca's cycles for a product of the loop without mask; never timed"
)


@dataclass(frozen=True)
class Result:
    tile: dict[str, Any]
    spills: int
    lds_bytes: int
    waves: int
    narrow: int
    cycles: float  # of a 16x16x16 product

    def rank(self) -> tuple:
        # One wave alone on a SIMD waits for all that it reads.
        return self.spills, self.narrow > 0, self.cycles * (1.25 if self.waves < 2 else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="*", default=ARCHS)
    parser.add_argument("--kernel", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--width", nargs="+", type=int, default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--write", action="store_true", help=f"put the best into {OP}.json")
    options = parser.parse_args()
    archs: Any = [targets.card(name).arch for name in options.arch]
    with Compiler() as compiler:
        for arch, kernel, width in itertools.product(archs, options.kernel, options.width):
            kind = "float32" if options.dtype == "float32" else "half"
            if kernel == "d_values" and _together(arch, width):
                if options.write:
                    write(OP, arch, f"{kernel} {kind} {width}", {}, METHOD)
                continue
            results = _try_all(compiler, arch, kernel, width, options.dtype)
            for r in results[:4]:
                print(arch, kernel, width, *(f"{k}={v}" for k, v in vars(r).items()), flush=True)
            if options.write and results:
                write(OP, arch, f"{kernel} {kind} {width}", results[0].tile, METHOD)


def candidates(arch: str, kernel: str, width: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Tiles worth compiling: one matrix instruction's rows for each wave, or two."""
    if dtype == "float32":
        for (q, k, warps), chunk in itertools.product(((16, 16, 8), (32, 32, 8)), (0, 16)):
            yield _tile(q, k, warps, chunk, False)
        return
    rdna = arch.startswith("gfx1")
    # (rows that stay, rows of the loop, warps)
    shapes = [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)]
    if not rdna:
        shapes = [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (64, 32, 2), (64, 64, 2)]
    elif width == 192:
        shapes += [(64, 64, 8), (32, 64, 4)]
    elif width == 256:
        shapes = [(32, 64, 4), (32, 128, 4), (64, 64, 8), (64, 128, 8), (32, 32, 4)]
    chunks = (0, 32 if width == 64 else 64) if rdna or width == 256 else (0,)
    for (own, other, warps), chunk in itertools.product(shapes, chunks):
        q, k = (own, other) if kernel in ("forward", "d_queries") else (other, own)
        tile = _tile(q, k, warps, chunk, rdna or arch == "gfx90a")
        yield tile
        if rdna and width == 192:
            yield tile | {"heads_first": False}  # other address arithmetic, fewer registers


def _together(arch: str, width: int) -> bool:
    """Whether one kernel makes d_keys and d_values: RDNA's 256 registers do not hold both sums,
    and CDNA's 512 not those of the widest heads."""
    return width < {"gfx90a": 192, "gfx942": 256, "gfx950": 512}.get(arch, 0)


def _tile(q: int, k: int, warps: int, chunk: int, transposed: bool) -> dict[str, Any]:
    given = {"q_block": q, "k_block": k, "num_warps": warps, "num_stages": 1}
    return (
        given | ({"chunk": chunk} if chunk else {}) | ({"transposed": True} if transposed else {})
    )


def _try_all(compiler: Any, arch: str, kernel: str, width: int, dtype: str) -> list[Result]:
    found = []
    for tile in candidates(arch, kernel, width, dtype):
        arguments = {"kernel": kernel, "width": width, "dtype": dtype, "tile": tile}
        arguments["together"] = _together(arch, width)
        try:
            found += _read(compiler.compile(Unit(FUNCTION, arguments, arch)), tile, kernel, width)
        except (CompileError, ValueError) as error:
            print(arch, kernel, width, tile, str(error).splitlines()[-1][-120:], flush=True)
    limit = targets.ARCHITECTURES[arch].lds_bytes_per_block
    return sorted((r for r in found if r.lds_bytes <= limit), key=Result.rank)


def _read(compiled: Any, tile: dict, kernel: str, width: int) -> list[Result]:
    kernels = [k for k in compiled.kernels if k.binary and k.name.startswith("attention")]
    if len(kernels) != 1:
        return []
    launched = kernels[0]
    read = next(b for b in binary.read(launched.binary) if b.name == launched.name)
    lines = assembly.disassemble(launched.binary, read.name)
    loops = [x for x in instructions.loops(read.code, read.arch) if x.counts[instructions.MATRIX]]
    narrow = sum(x.counts[instructions.NARROW_LOAD] for x in loops)
    waves = read.waves_per_simd(launched.threads, launched.dynamic_lds_bytes)
    lds = read.lds_bytes + launched.dynamic_lds_bytes
    try:
        cycles = _cycles(loops, lines, read.arch, tile, kernel, width)
    except ValueError as error:  # llvm-mca gives up on some long loops
        print(read.arch, kernel, width, tile, error, flush=True)
        cycles = float("inf")
    return [Result(tile, read.vgpr_spills, lds, waves, narrow, round(cycles, 2))]


def _cycles(loops: list, lines: list, arch: str, tile: dict, kernel: str, width: int) -> float:
    """llvm-mca's cycles of one pass of a wave, the loop over columns counted as often as it runs,
    over the pass's 16x16x16 products."""
    if not loops:
        return float("inf")
    D, Dv = HEADS[width]
    depth = {"forward": D + Dv, "d_queries": 2 * D + Dv, "d_keys": 2 * D + Dv, "d_values": D + Dv}
    depth["d_keys"] += Dv * _together(arch, width)
    work = tile["q_block"] * tile["k_block"] * depth[kernel] / 16**3 / tile["num_warps"]
    best = float("inf")
    most = max(x.counts[instructions.MATRIX] for x in loops)
    for outer in (x for x in loops if x.counts[instructions.MATRIX] == most):
        within = [x for x in loops if outer.start <= x.start and x.end <= outer.end and x != outer]
        total = assembly.cycles(lines, outer, arch)
        if tile.get("chunk") and within:
            fewest = min(x.counts[instructions.MATRIX] for x in within)
            turning = [x for x in within if x.counts[instructions.MATRIX] == fewest]
            turns = D // tile["chunk"] - 1
            total += sum(turns * assembly.cycles(lines, x, arch) for x in turning)
        best = min(best, total / work)
    return best


if __name__ == "__main__":
    run(main)
