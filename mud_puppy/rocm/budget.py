"""The resources that compiled kernels take, as a table that can be kept and compared.

A module of `mud_puppy.kernels` that has Pallas kernels defines

    rocm_cases(arch) -> [(case name, "package.module:function", arguments), ...]

with every tuned configuration for that architecture, each a `compile.Unit` without its card.
`cases` finds them, `measure` compiles and reads them, `faults` judges a row by itself and `worse`
against the row that was kept.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields

import mud_puppy.kernels
from mud_puppy.rocm import assembly, binary, instructions
from mud_puppy.rocm.compile import Compiled, Compiler, Kernel, Unit
from mud_puppy.rocm.instructions import MATRIX
from mud_puppy.rocm.targets import ARCHITECTURES


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one architecture.

    The loop is the outermost one with the most matrix instructions, the shortest of several: in a
    kernel that masks only some blocks, the loop over the others. It counts as one pass of it runs,
    with all passes of the loops within. `narrow` counts LDS loads of one or two bytes in
    all loops, as they stand in the code. `work` is what the source asks of one wave in one pass, in
    products of 16x16x16 (8,192 FLOP); if more matrix instructions of that size run, waves repeat
    each other's work. `cycles` is llvm-mca's estimate for one matrix instruction's share of the
    pass.
    """

    arch: str
    case: str
    kernel: str
    vgprs: int
    spills: int  # of vector registers
    scratch_bytes: int
    lds_bytes: int
    threads: int
    waves: int  # that share a SIMD
    dots: int  # in the source
    matrix: int  # instructions
    narrow: int
    loop: int  # its instructions
    loop_matrix: int
    work: float
    cycles: float | None

    @property
    def cycles_per_work(self) -> float | None:
        """The estimate for 8,192 FLOP of the source."""
        return self.cycles * self.loop_matrix / self.work if self.cycles and self.work else None


def cases(arch: str) -> Iterator[tuple[str, Unit]]:
    """(case name, unit) of every tuned configuration of every kernel."""
    package = mud_puppy.kernels
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        found = vars(importlib.import_module(module.name)).get("rocm_cases")
        if found is None or found.__module__ != module.name:
            continue
        for name, function, arguments in found(arch):
            yield name, Unit(function, arguments, arch)


def measure(compiler: Compiler, case: str, unit: Unit, estimate: bool = True) -> list[Row]:
    """Compile a case and read its Pallas kernels. `estimate`: also ask llvm-mca.

    Raises compile.CompileError, and ValueError where a kernel cannot be told from another.
    """
    return rows(case, compiler.compile(unit), estimate)


def rows(case: str, compiled: Compiled, estimate: bool = True) -> list[Row]:
    """A row for each Pallas kernel that was launched; those of a name count once."""
    launched = {k.name: k for k in compiled.kernels if k.binary is not None}
    unread = {k.name for k in compiled.kernels if k.dots and k.binary is None}
    if unread:
        raise ValueError(f"{case}: several kernels are named {', '.join(sorted(unread))}")
    return [_row(case, kernel, estimate) for kernel in launched.values()]


def _row(case: str, kernel: Kernel, estimate: bool) -> Row:
    assert kernel.binary
    read = next(b for b in binary.read(kernel.binary) if b.name == kernel.name)
    every = instructions.loops(read.code, read.arch)
    loops = [x for x in every if x.counts[MATRIX]]
    loop = main_loop(loops, kernel.loop_depth)
    # What stands once in the code of the loop and runs several times in a pass of it.
    within = [x for x in loops if loop and loop.holds(x) and x.depth == loop.depth + 1]
    again = [(x, kernel.inner_passes - 1) for x in within]
    parts = [(loop, 1), *again] if loop else []
    matrix = sum(n * x.counts[MATRIX] for x, n in parts)
    total = _cycles(kernel, parts, read.arch) if estimate and parts else None
    return Row(
        arch=read.arch,
        case=case,
        kernel=kernel.name,
        vgprs=read.vgprs,
        spills=read.vgpr_spills,
        scratch_bytes=read.scratch_bytes,
        lds_bytes=read.lds_bytes + kernel.dynamic_lds_bytes,
        threads=kernel.threads,
        waves=read.waves_per_simd(kernel.threads, kernel.dynamic_lds_bytes),
        dots=kernel.dots,
        matrix=instructions.count(read.code, read.arch)[MATRIX],
        narrow=sum(x.counts[instructions.NARROW_LOAD] for x in every if x.depth == 0),
        loop=sum(n * x.counts.total() for x, n in parts),
        loop_matrix=matrix,
        work=round(kernel.loop_flops / 8192 * read.wave_size / kernel.threads, 2),
        cycles=None if total is None else round(total / matrix, 1),
    )


def _cycles(kernel: Kernel, parts: list[tuple[instructions.Loop, int]], arch: str) -> float | None:
    assert kernel.binary
    try:
        lines = assembly.disassemble(kernel.binary, kernel.name)
        return sum(n * assembly.cycles(lines, loop, arch) for loop, n in parts if n)
    except assembly.NoEstimate:
        return None


def main_loop(loops: list[instructions.Loop], depth: int = 0) -> instructions.Loop | None:
    """At that depth (or as deep as they go), the one with the most matrix instructions; of equals
    the shortest."""
    depth = min(depth, max((x.depth for x in loops), default=0))
    at_depth = (x for x in loops if x.depth == depth)
    return max(at_depth, key=lambda x: (x.counts[MATRIX], -x.counts.total()), default=None)


def faults(row: Row) -> list[str]:
    """What no tuned kernel may have: spills, too much LDS, products without matrix instructions,
    LDS read one or two bytes at a time in a loop."""
    limit = ARCHITECTURES[row.arch].lds_bytes_per_block
    found = []
    if row.spills:
        found.append(f"{row.spills} vector registers are spilled")
    if row.lds_bytes > limit:
        found.append(f"{row.lds_bytes} bytes of LDS, {limit} fit")
    if row.dots and not row.matrix:
        found.append(f"{row.dots} matrix products and no matrix instruction")
    if row.narrow:
        found.append(f"{row.narrow} LDS loads of one or two bytes in loops")
    return found


def worse(row: Row, kept: Row) -> list[str]:
    """In what the row is worse than the one that was kept; estimates count beyond 5 %."""
    found = []
    if row.scratch_bytes > kept.scratch_bytes:
        found.append(f"scratch_bytes: {row.scratch_bytes}, it was {kept.scratch_bytes}")
    if row.waves < kept.waves:
        found.append(f"waves: {row.waves}, it was {kept.waves}")
    if row.cycles and kept.cycles and row.cycles > 1.05 * kept.cycles:
        found.append(f"cycles: {row.cycles}, it was {kept.cycles}")
    return found


COLUMNS = [f.name for f in fields(Row)]


def render(table: Iterable[Row]) -> str:
    """The rows as a Markdown table, which `parse` reads back."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [["" if v is None else str(v) for v in astuple(row)] for row in table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse(text: str) -> list[Row]:
    """The rows of a Markdown page with such a table."""
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| gfx")
    ]
    return [_parsed(line) for line in cells]


def _parsed(cells: list[str]) -> Row:
    arch, case, kernel, *counts, work, cycles = cells
    numbers = dict(zip(COLUMNS[3:-2], map(int, counts), strict=True))
    estimate = float(cycles) if cycles else None
    return Row(arch, case, kernel, **numbers, work=float(work), cycles=estimate)
