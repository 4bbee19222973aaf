"""What every tuned Pallas kernel costs on AMD's architectures, read from the compiled binaries.

    python tools/rocm_table.py                       # print the table, all ops and architectures
    python tools/rocm_table.py --write               # also into docs/rocm_kernels.md; with --arch
                                                     # or --only, the other rows stay
    python tools/rocm_table.py --check               # fail on spills, LDS, products without matrix
                                                     # instructions, narrow LDS loads in loops, or
                                                     # rows worse than those kept
    python tools/rocm_table.py --arch gfx1100 --only flash_attention
    python tools/rocm_table.py --arch gfx1100 --unit my.py:build --arguments '{"block": 64}'

No AMD card is needed; XLA's ROCm plugin is (the error says how to install it). The estimate of
cycles needs LLVM's tools (llvm-22); without them that column stays empty and is not checked.
The last form reads one function of your own: build(**arguments) -> (callable, argument shapes).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.errors import UserError
from mud_puppy.rocm import assembly, budget, targets
from mud_puppy.rocm.compile import CompileError, Compiler, Unit

KEPT = Path(__file__).parents[1] / "docs" / "rocm_kernels.md"
STOCK = "stock attention forward 64/32 head 128"
TITLE = """# Kernels on AMD architectures

Written by `python tools/rocm_table.py --write`; `--check` compares with it. Nothing here was timed:
these are readings of binaries that XLA's ROCm compiler made without a card (jax {jax}).
Columns: vector registers, those spilled, scratch and LDS bytes, threads of a block, waves that
share a SIMD, matrix products in the source, matrix instructions, LDS loads of one or two bytes in
all loops; then of the main loop: instructions, matrix instructions, what the source asks of a wave
in products of 16x16x16, llvm-mca's cycles for each matrix instruction (empty where it gives none).
llvm-mca counts a WMMA's issue, not the cycles that it occupies the SIMD.
"{stock}" is JAX's own kernel, for comparison; it is not held to
anything. {compared}

"""
COMPARED = "flash_attention forward head 128"


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where --check found something or a case does not compile; 2 where it
    cannot run as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--arch", nargs="+", default=list(targets.ARCHITECTURES))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--unit", help="a function of your own, module:name or file.py:name")
    parser.add_argument("--arguments", type=_arguments, default={}, help="its arguments, as JSON")
    parser.add_argument("--folder", type=Path, help="keep the binaries here")
    parser.add_argument("--write", action="store_true", help=f"write {KEPT.name}")
    parser.add_argument("--check", action="store_true", help="fail on what is wrong or worse")
    options = parser.parse_args(arguments)
    if options.write and options.unit:
        parser.error("--write is for the project's own kernels, --unit for others")
    try:
        options.arch = [targets.card(name).arch for name in options.arch]
        cases = _cases(options)
        if not cases:
            raise UserError(f"no case has '{options.only}' in its name")
        rows, failed = _measure(cases, options.folder)
    except UserError as error:
        parser.exit(2, f"rocm_table: {error}\n")
    print(budget.render(rows), end="")
    print(_compared(rows))
    problems = failed + _problems(rows, options.check and not options.unit)
    for problem in problems:
        print(problem, file=sys.stderr)
    if options.write and failed:
        print(f"{KEPT.name} was not written", file=sys.stderr)
    elif options.write:
        whole = _merged(options, rows)
        title = TITLE.format(jax=jax.__version__, stock=STOCK, compared=_compared(whole))
        KEPT.write_text(title + budget.render(whole))
    return 1 if problems and (options.check or failed) else 0


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"not an object of JSON: {text}")
    return found


def _merged(options: argparse.Namespace, rows: list[budget.Row]) -> list[budget.Row]:
    """The rows and those of the page that these options leave alone, in the order of the cases."""
    archs = list(targets.ARCHITECTURES)
    cases = {a: [*(name for name, _ in budget.cases(a)), STOCK] for a in archs}
    kept = budget.parse(KEPT.read_text()) if KEPT.exists() else []
    others = (r for r in kept if r.arch not in options.arch or options.only not in r.case)
    whole = [r for r in others if r.case in cases[r.arch]] + rows
    return sorted(whole, key=lambda r: (archs.index(r.arch), cases[r.arch].index(r.case)))


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _cases(options: argparse.Namespace) -> list[tuple[str, Unit]]:
    found = []
    for arch in options.arch:
        if options.unit:
            found.append((options.unit, Unit(options.unit, options.arguments, arch)))
            continue
        found += budget.cases(arch)
        found.append((STOCK, Unit(f"{Path(__file__).resolve()}:stock_attention", {}, arch)))
    return [(name, unit) for name, unit in found if options.only in name]


def _measure(
    cases: list[tuple[str, Unit]], folder: Path | None
) -> tuple[list[budget.Row], list[str]]:
    """The rows, and a line for each case that does not compile."""
    estimate = _has_llvm()
    rows, failed = [], []
    with Compiler(folder) as compiler:
        for name, unit in cases:
            try:
                rows += budget.measure(compiler, name, unit, estimate)
            except UserError:  # not this case's: no worker starts
                raise
            except (CompileError, ValueError) as error:
                failed.append(f"{unit.card} {name}: {error}")
    return rows, failed


def _problems(rows: list[budget.Row], compare: bool) -> list[str]:
    kept = budget.parse(KEPT.read_text()) if compare and KEPT.exists() else []
    before = {(r.arch, r.case, r.kernel): r for r in kept}
    found = []
    for row in rows:
        if row.case == STOCK:
            continue
        known = before.get((row.arch, row.case, row.kernel))
        faults = budget.faults(row) + (budget.worse(row, known) if known else [])
        if compare and kept and not known:
            faults.append(f"not in {KEPT.name}: run --write")
        found += [f"{row.arch} {row.case} {row.kernel}: {fault}" for fault in faults]
    return found


def _compared(rows: list[budget.Row]) -> str:
    """Estimated cycles a FLOP of the source, ours against stock."""
    cycles = {(r.case, r.arch): r.cycles_per_work for r in rows}
    ratios = []
    for arch in targets.ARCHITECTURES:
        ours, stock = cycles.get((COMPARED, arch)), cycles.get((STOCK, arch))
        if ours and stock:
            ratios.append(f"{arch} {stock / ours:.2f}")
    if not ratios:
        return ""
    return f'Estimated cycles a FLOP, stock over "{COMPARED}": {", ".join(ratios)}.'


def _has_llvm() -> bool:
    try:
        for name in ("llvm-objdump", "llvm-mca"):
            assembly.tool(name)
    except UserError as error:
        print(f"rocm_table: no estimates of cycles: {error}", file=sys.stderr)
        return False
    return True


def stock_attention(head: int = 128, q_block: int = 64, k_block: int = 32) -> Any:
    """JAX's own Pallas attention, forward, causal, as a unit to compile."""
    from jax.experimental.pallas.ops.gpu import attention

    sizes = attention.BlockSizes(q_block, k_block, 32, 32, 32, 32)

    def forward(q, k, v):
        return attention.mha(
            q, k, v, segment_ids=None, causal=True, sm_scale=head**-0.5, block_sizes=sizes,
            num_stages=1,
        )  # fmt: skip

    x = jax.ShapeDtypeStruct((1, 4096, 16, head), jnp.bfloat16)
    return forward, (x, x, x)


if __name__ == "__main__":
    sys.exit(main())
