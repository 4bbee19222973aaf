"""The table of docs/recipes.md: every YAML of configs/ compiled for the card that it names.

    python tools/plan_table.py              # print it
    python tools/plan_table.py --write      # into docs/recipes.md
    python tools/plan_table.py --check      # what CI runs

`--check` fails where a recipe no longer compiles, outgrows its card, names no card, or needs 2 %
more than the table says. Needs XLA's ROCm plugin (docs/kernels_rocm.md), no card.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Here: two threads cannot import it at once.
from transformers import AutoConfig  # noqa: F401

from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.plan import Plan, plan

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
COLUMNS = ("recipe", "card", "model", "method", "batch", "needs GiB", "of GiB", "host GiB", "bound")
SLACK = 1.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/recipes.md")
    parser.add_argument("--check", action="store_true", help="compare with docs/recipes.md")
    args = parser.parse_args()
    recipes = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if trains(path)]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(recipes, pool.map(planned, recipes), strict=True))
    table = [line(COLUMNS), line(["---"] * len(COLUMNS))]
    table += [line(cells(path, p)) for path, p in found.items() if isinstance(p, Plan)]
    print("\n".join(table))
    faults = [
        f for path, p in found.items() for f in faults_of(path, p, kept() if args.check else {})
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    if args.write and not faults:
        head, _, _ = PAGE.read_text().partition("| recipe |")
        PAGE.write_text(head + "\n".join(table) + "\n")
    return 1 if faults else 0


def trains(path: Path) -> bool:
    """Whether there is a step: gptq has none."""
    return Config.load(path).method != "gptq"


def planned(path: Path) -> Plan | str:
    """The plan, or why there is none."""
    try:
        config = Config.load(path)
        if config.target is None:
            return f"{path.name}: names no target"
        return plan(config, search=False)
    except UserError as error:
        return f"{path.name}: {error}"


def cells(path: Path, found: Plan) -> list[str]:
    built, place = found.built, found.place
    speed = found.roofline_tokens_per_s
    return [
        path.stem,
        place.card.name if place.card else place.name,
        found.model.split(" (")[0],
        found.config.method,
        f"{found.rows} x {found.length}",
        f"{built.needed / 2**30:.2f}",
        f"{place.limit / 2**30:.1f}",
        f"{built.host / 2**30:.1f}",
        "" if speed is None else f"{speed:,.0f}",
    ]


def line(values) -> str:
    return f"| {' | '.join(values)} |"


def kept() -> dict[str, float]:
    """GiB of each recipe in the page."""
    rows = [[c.strip() for c in row.strip("|").split("|")] for row in PAGE.read_text().splitlines()]
    return {r[0]: float(r[5]) for r in rows if len(r) == len(COLUMNS) and r[5][:1].isdigit()}


def faults_of(path: Path, found: Plan | str, before: dict[str, float]) -> list[str]:
    if isinstance(found, str):
        return [found]
    needs, limit = found.built.needed / 2**30, found.place.limit / 2**30
    if not found.fits:
        return [f"{path.name}: needs {needs:.2f} GiB, {found.place.name} has {limit:.2f}"]
    if before and path.stem not in before:
        return [f"{path.name}: not in {PAGE.name}; run tools/plan_table.py --write"]
    if before and needs > SLACK * before[path.stem]:
        return [f"{path.name}: needs {needs:.2f} GiB, it was {before[path.stem]:.2f}"]
    return []


if __name__ == "__main__":
    sys.exit(main())
