"""Choose the tiles of the GEMM-like kernels and of decode for AMD cards, by reading the binaries.

    python tools/tune_tiles.py gfx1100 --op grouped_matmul
    python tools/tune_tiles.py --write               # every op and architecture

Ops: cross_entropy, grouped_matmul, decode_attention. Every candidate is compiled; those that spill,
need too much LDS or read LDS two bytes at a time are out where any other is left. The GEMMs are
then ordered by llvm-mca's cycles for a 16x16x16 product of the inner loop, and of those within 10 %
the one with the larger tile is taken, which reads less memory; decode by wave cycles for a key.
Nothing is timed: no card is here. Needs what tools/rocm_table.py needs.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mud_puppy.errors import UserError
from mud_puppy.kernels import tuned
from mud_puppy.kernels.attention import decode_cases
from mud_puppy.kernels.cross_entropy import cases as cross_entropy
from mud_puppy.kernels.grouped_matmul import cases as grouped_matmul
from mud_puppy.rocm import assembly, binary, budget, instructions, targets
from mud_puppy.rocm.compile import CompileError, Compiler, Unit

ARCHS = ["gfx1100", "gfx1201", "gfx90a", "gfx942", "gfx950"]
METHOD = (
    "tools/tune_tiles.py: no spills, LDS in bounds, no two-byte LDS loads in the loop, then "
    "llvm-mca's cycles and the tile's size; never timed"
)
# (side, side, depth, warps)
GEMMS = {
    "rdna": [(128, 128, 32, 4), (128, 256, 32, 8), (64, 128, 64, 4), (128, 64, 64, 4),
             (128, 128, 64, 8), (64, 128, 32, 4)],
    "cdna": [(128, 128, 32, 4), (128, 128, 64, 4), (128, 256, 32, 8), (128, 256, 64, 8),
             (256, 256, 32, 8), (64, 128, 32, 4)],
}  # fmt: skip
FLOAT32 = [(64, 64, 16, 4), (32, 64, 16, 4), (64, 64, 32, 8), (32, 32, 16, 4)]
# Where the matrix instructions' operands would come out of LDS two bytes at a time.
TRANSPOSED = {"d_x": ("gfx1", "gfx90a"), "d_w": ("gfx1", "gfx90a", "gfx942")}
# (keys, warps, queries without matrix instructions or None)
DECODE = {
    "rdna": [(64, 8, 4), (32, 8, 4), (32, 4, 2), (16, 8, 4), (16, 4, 2), (16, 8, 2)],
    "cdna": [(64, 4, None), (32, 4, None), (32, 4, 4), (64, 4, 4), (16, 4, 4)],
}


@dataclass(frozen=True)
class Trial:
    """A tile, and what the binaries of all the kernels that use it are at worst."""

    tile: dict[str, Any]
    spills: int
    lds_bytes: int
    narrow: int
    waves: int
    cycles: float  # of a product, or of a key
    area: int

    def rank(self, best: float) -> tuple:
        near = self.cycles <= 1.1 * best
        return self.spills, self.narrow > 0, not near, -self.area if near else self.cycles


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose tiles for AMD cards.")
    parser.add_argument("arch", nargs="*", default=ARCHS)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--write", action="store_true", help="put the best into the op's table")
    options = parser.parse_args()
    options.arch = [targets.card(name).arch for name in options.arch]
    with Compiler() as compiler:
        for arch in options.arch:
            for op in options.op:
                for key, function, arguments, tiles in OPS[op](arch):
                    trials = _try_all(compiler, arch, function, arguments, tiles)
                    for t in trials:
                        print(arch, op, key, *(f"{k}={v}" for k, v in vars(t).items()), flush=True)
                    if options.write and trials:
                        write(op, arch, key, trials[0].tile, METHOD)


def _gemms(op: str, names: tuple[str, str], keys: dict, function: str, arch: str) -> Iterator:
    rdna = arch.startswith("gfx1")
    for key, kernels in keys.items():
        for kind, shapes in (("half", GEMMS["rdna" if rdna else "cdna"]), ("float32", FLOAT32)):
            tiles = [
                dict(zip((*names, "depth", "num_warps", "num_stages"), (*s, 1), strict=True))
                | ({"transposed": True} if arch.startswith(TRANSPOSED.get(key, ())) else {})
                for s in shapes
            ]
            dtype = "bfloat16" if kind == "half" else kind
            yield (
                f"{key} {kind}",
                function,
                [{"kernel": kernel, "dtype": dtype} for kernel in kernels],
                tiles,
            )


def _cross_entropy(arch: str) -> Iterator:
    keys = {"score": ("score", "score_write"), "slope": ("slope",)}
    return _gemms("cross_entropy", ("tokens", "rows"), keys, cross_entropy.FUNCTION, arch)


def _grouped_matmul(arch: str) -> Iterator:
    keys = {k: (k,) for k in grouped_matmul.KERNELS}
    return _gemms("grouped_matmul", ("rows", "columns"), keys, grouped_matmul.FUNCTION, arch)


def _decode(arch: str) -> Iterator:
    rdna = arch.startswith("gfx1")
    for kind in ("half", "int8", "float32"):
        for width in (64, 128, 256):
            tiles = [
                {"block": n, "num_warps": w, "num_stages": 1, "programs": 768}
                | ({"rows": rows} if rows else {})
                for n, w, rows in DECODE["rdna" if rdna else "cdna"]
                # float32 products of whole heads would fill the registers.
                if rows or kind != "float32"
            ]
            arguments = {"kind": kind, "width": width}
            yield f"{kind} {width}", decode_cases.FUNCTION, [arguments], tiles


OPS = {
    "cross_entropy": _cross_entropy,
    "grouped_matmul": _grouped_matmul,
    "decode_attention": _decode,
}


def _try_all(compiler: Any, arch: str, function: str, arguments: list, tiles: list) -> list[Trial]:
    trials = []
    for tile in tiles:
        try:
            units = [Unit(function, given | {"tile": tile}, arch) for given in arguments]
            trials.append(_trial(tile, [compiler.compile(unit, timeout_s=60) for unit in units]))
        except (CompileError, ValueError) as error:
            print(arch, arguments, tile, str(error).splitlines()[-1][-120:], flush=True)
    limit = targets.ARCHITECTURES[arch].lds_bytes_per_block
    fitting = [t for t in trials if t.lds_bytes <= min(limit, 65536)]
    clean = [t.cycles for t in fitting if not t.spills and not t.narrow]
    best = min(clean or [t.cycles for t in fitting], default=0.0)
    return sorted(fitting, key=lambda t: t.rank(best))


def _trial(tile: dict, compiled: list) -> Trial:
    rows = [row for c in compiled for row in budget.rows("", c, "block" not in tile)]
    if "block" in tile:
        cycles, area = max(_key_cycles(c, tile) for c in compiled), 0
    else:
        cycles = max(r.cycles_per_work or float("inf") for r in rows)
        sides = [v for k, v in tile.items() if k in ("tokens", "rows", "columns")]
        area = sides[0] * sides[1]
    return Trial(
        tile,
        max(r.spills for r in rows),
        max(r.lds_bytes for r in rows),
        max(r.narrow for r in rows),
        min(r.waves for r in rows),
        round(cycles, 1),
        area,
    )


def _key_cycles(compiled: Any, tile: dict) -> float:
    """llvm-mca's cycles of the loop over keys, of all waves, for one key and four queries."""
    kernel = next(k for k in compiled.kernels if k.binary)
    read = next(b for b in binary.read(kernel.binary) if b.name == kernel.name)
    loops = [x for x in instructions.loops(read.code, read.arch) if x.inner]
    loop = max(loops, key=lambda x: x.counts.total())
    lines = assembly.disassemble(kernel.binary, kernel.name)
    total = assembly.cycles(lines, loop, read.arch) * tile["num_warps"]
    return total / tile["block"] * 4 / tile.get("rows", 4)


def write(op: str, arch: str, key: str, tile: dict, method: str) -> None:
    """Puts a tile, chosen by reading binaries, into the table of `op`."""
    path = tuned.TABLES / f"{op}.json"
    table = json.loads(path.read_text())
    entry = table.setdefault(arch, {"tiles": {}})
    entry |= {
        "device": f"none: compiled for {targets.card(arch).name}",
        "versions": f"jax {jax.__version__}",
        "date": datetime.date.today().isoformat(),
        "method": method,
    }
    entry["tiles"][key] = tile
    path.write_text(tuned_text(table))


def tuned_text(table: dict) -> str:
    """JSON with one line a tile."""
    parts = []
    for arch, entry in table.items():
        head = {k: v for k, v in entry.items() if k != "tiles"}
        start = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items())
        tiles = [f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in entry["tiles"].items()]
        body = ",\n".join(tiles)
        parts.append(f' {json.dumps(arch)}: {{\n{start}  "tiles": {{\n{body}\n  }}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def run(main: Callable[[], None]) -> None:
    """A tool's `main`; what its user did wrong is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
