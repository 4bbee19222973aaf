"""Choose quantized_matmul's tiles for AMD cards by reading the binaries; no card is needed.

    python tools/tune_quantized.py                   # print what was chosen, every architecture
    python tools/tune_quantized.py gfx1100 --write   # also into mud_puppy/kernels/tables

Every candidate is compiled for the first of the formats that share an entry. Those that spill or
read LDS one or two bytes at a time in the loop are out; of the others, the one that spends the
fewest lane instructions a weight in its loop, where decoding goes, is taken, and of those within
15 % the one that leaves the most waves on a SIMD, if the entry's other formats neither spill nor
read so with it. Nothing is timed. Needs what tools/rocm_table.py needs.
"""

import argparse
import datetime
import itertools
import json
from collections.abc import Iterable
from typing import Any

import jax
from tune_tiles import run

from mud_puppy.kernels import formats, tuned
from mud_puppy.kernels.quantized_matmul import cases
from mud_puppy.kernels.quantized_matmul import plan as plans
from mud_puppy.kernels.quantized_matmul.plan import OP
from mud_puppy.rocm import budget, targets
from mud_puppy.rocm.compile import CompileError, Compiler, Unit

METHOD = (
    "tools/tune_quantized.py: no spills, no LDS loads of one or two bytes, fewest lane "
    "instructions a weight in the loop, then most waves; never timed"
)
PROGRAMS = 512  # enough for 96 to 304 compute units
CROSSOVER = 128  # rows; not measured, from the H100's 192 and the decoders' instructions
# (rows of the weight, inputs in a step, warps)
TILES = [
    *itertools.product((32, 64, 128), (128, 256), (4,)),
    (64, 256, 8),
    (128, 256, 8),
    (64, 512, 4),
]
VECTOR = {
    "rows": 8,
    "columns": 1024,
    "num_warps": 4,
    "num_stages": 1,
}  # not chosen: no loop is read
SAME = {"gfx1101": "gfx1100"}  # the same instructions and registers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arch", nargs="*", default=list(targets.ARCHITECTURES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.arch = [targets.card(name).arch for name in options.arch]
    path = tuned.TABLES / f"{OP}.json"
    with Compiler() as compiler:
        new = {a: _entry(a, _tiles(compiler, a)) for a in options.arch if a not in SAME}
    table = json.loads(path.read_text()) | new
    for arch, same in SAME.items():
        table[arch] = table[same] | {"device": f"none: compiled for {same}"}
    if options.write:
        path.write_text(json.dumps(table, indent=1) + "\n")


def _entry(arch: str, tiles: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": f"none: compiled for {arch}",
        "versions": f"jax {jax.__version__} and its ROCm plugin",
        "date": datetime.date.today().isoformat(),
        "method": METHOD,
        "tiles": tiles | {"crossover": {"rows": CROSSOVER}},
    }


def _tiles(compiler: Compiler, arch: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for kind in dict.fromkeys(map(_kind, cases.VARIANTS)):
        first, *others = (name for name in cases.VARIANTS if _kind(name) == kind)
        if first in formats.PACKED:
            chosen[f"{kind} 1"] = VECTOR
        for rows in (16, 64):
            ranked = _ranked(
                (cost, waves, tile)
                for tile in _candidates(rows)
                for cost, waves in _costs(compiler, arch, first, rows, tile)
            )
            cost, waves, tile = next(
                found
                for found in ranked
                if all(_costs(compiler, arch, name, rows, found[2]) for name in others)
            )
            chosen[f"{kind} {rows}"] = tile
            chosen[f"{kind} {2 * rows}"] = tile | {"x_rows": min(2 * rows, 64)}
            print(f"{arch} {kind} {rows}: {tile}, {cost:.1f} a weight, {waves} waves", flush=True)
    return chosen


def _kind(variant: str) -> str:
    return plans.kind(cases.VARIANTS[variant]["format"])


def _ranked(found: Iterable[tuple[float, int, Any]]) -> list[tuple[float, int, Any]]:
    """(cost, waves, tile), the best first: those within 15 % of the least cost by waves."""
    by_cost = sorted(found, key=lambda f: f[0])
    near = [f for f in by_cost if f[0] <= 1.15 * by_cost[0][0]]
    return sorted(near, key=lambda f: -f[1]) + by_cost[len(near) :]


def _candidates(rows: int) -> list[dict[str, int]]:
    return [
        {"rows": r, "x_rows": min(rows, 64), "columns": c, "programs": PROGRAMS,
         "num_warps": w, "num_stages": 1}
        for r, c, w in TILES
    ]  # fmt: skip


def _costs(
    compiler: Compiler, arch: str, variant: str, rows: int, tile: dict[str, int]
) -> list[tuple[float, int]]:
    """[(lane instructions a weight, waves)], empty where the tile cannot be used."""
    arguments = {"name": variant, "rows": rows, "tiles": tile}
    try:
        compiled = compiler.compile(Unit(f"{cases.__name__}:unit", arguments, arch))
        (row,) = budget.rows(variant, compiled, False)
    except (CompileError, ValueError):
        return []
    if row.spills or row.narrow or budget.faults(row):
        return []
    return [(row.loop * row.threads / (tile["rows"] * tile["columns"]), row.waves)]


if __name__ == "__main__":
    run(main)
