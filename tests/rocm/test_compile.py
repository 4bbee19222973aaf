"""Compiling for AMD cards without one: the plugin is in $MUD_PUPPY_ROCM (see .ci/run)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mud_puppy.errors import UserError
from mud_puppy.rocm import assembly, binary, budget, instructions
from mud_puppy.rocm.compile import CompileError, Compiler, Unit
from mud_puppy.rocm.targets import ARCHITECTURES

pytestmark = pytest.mark.rocm
UNITS = Path(__file__).with_name("units.py")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    with Compiler(tmp_path_factory.mktemp("binaries")) as compiler:
        yield compiler


def unit(name, arch="gfx1100", **arguments):
    return Unit(f"{UNITS}:{name}", arguments, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_product_has_matrix_instructions_everywhere(compiler, arch):
    (row,) = budget.measure(compiler, "product", unit("product", arch), estimate=False)
    assert (row.arch, row.kernel, row.dots) == (arch, "product", 1)
    assert budget.faults(row) == []
    assert row.loop_matrix == row.matrix > 0
    assert row.work == 2.0  # four waves, a product of 32x32x32
    assert row.threads == 4 * ARCHITECTURES[arch].wave_size
    assert row.lds_bytes >= 2048 and 1 <= row.waves <= 16


def test_a_pass_counts_what_runs_in_it(compiler):
    """8 passes of an inner loop, each a product of 32x32x32 shared by four waves."""
    one = 2 * 32**3
    for arguments, expected in (
        ({"known": True}, (8 * one, 0, 8)),
        ({"known": False}, (one, 1, 1)),
        ({"known": False, "told": 4}, (4 * one, 0, 4)),
    ):
        (kernel,) = compiler.compile(unit("nested", **arguments)).kernels
        assert (kernel.loop_flops, kernel.loop_depth, kernel.inner_passes) == expected
        (row,) = budget.measure(compiler, "", unit("nested", **arguments), estimate=False)
        assert row.work == 2.0 * expected[2]
        assert row.loop_matrix == row.work  # no wave repeats another's work


def test_memory_is_that_of_the_arrays(compiler):
    memory = compiler.compile(unit("product", size=256)).memory
    assert memory.argument == 2 * 256 * 256 * 2
    assert memory.output == 256 * 256 * 4
    assert memory.peak >= memory.argument + memory.output


def test_a_spill_is_seen(compiler):
    (row,) = budget.measure(compiler, "spilling", unit("spilling"), estimate=False)
    assert row.spills > 0 and row.scratch_bytes > 0
    assert any("spilled" in fault for fault in budget.faults(row))


def test_a_gather_of_two_bytes_is_seen(compiler):
    (row,) = budget.measure(compiler, "", unit("product", along_k=False), estimate=False)
    assert row.narrow > 0
    assert any("LDS loads of one or two bytes" in fault for fault in budget.faults(row))


def test_a_unit_compiled_again_still_has_its_binary(compiler):
    """XLA compiles equal kernels once in a process, and leaves a file only then."""
    once, again = (compiler.compile(unit("product")).kernels for _ in range(2))
    assert once == again and once[0].binary.exists()


def test_loops_are_looked_into_and_xlas_own_kernels_listed(compiler):
    kernels = compiler.compile(unit("scanned")).kernels
    (product,) = (k for k in kernels if k.name == "product")
    assert product.dots == 1 and binary.read(product.binary)[0].name == "product"
    assert any(k.binary is None and k.dots == 0 for k in kernels)


def test_another_architecture_is_traced_anew(compiler):
    binaries = [
        compiler.compile(unit("product", arch)).kernels[0].binary
        for arch in ("gfx1100", "gfx942", "gfx1100")
    ]
    assert [binary.read(b)[0].arch for b in binaries if b] == ["gfx1100", "gfx942", "gfx1100"]


def test_errors_come_back_and_the_next_unit_compiles(compiler):
    with pytest.raises(CompileError, match="this unit cannot be built"):
        compiler.compile(unit("broken"))
    with pytest.raises(CompileError, match="crashed"):
        compiler.compile(unit("crash"))
    with pytest.raises(CompileError, match=r"longer than 0\.01 s"):
        compiler.compile(unit("product", size=1024), timeout_s=0.01)
    with pytest.raises(UserError, match="no known AMD card"):
        compiler.compile(unit("product", "gfx0"))
    assert compiler.compile(unit("product")).kernels[0].dots == 1


def test_two_workers_share_a_folder_and_none_sees_the_others_binaries(tmp_path):
    folder = tmp_path / "with a space"
    with Compiler(folder) as one, Compiler(folder) as other:
        first = one.compile(unit("product")).kernels[0].binary
        second = other.compile(unit("product")).kernels[0].binary
    assert first and second and first.parent != second.parent
    assert {first.parent.parent, second.parent.parent} == {folder}
    assert first.read_bytes() == second.read_bytes()


def test_a_worker_that_cannot_start_is_not_the_units_fault(tmp_path):
    library = tmp_path / "jax_plugins" / "xla_rocm7" / "xla_rocm_plugin.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    with Compiler(tmp_path / "binaries", plugin_folder=tmp_path) as compiler:
        for _ in range(2):
            with pytest.raises(UserError, match="plugin is damaged"):
                compiler.compile(unit("product"))
    with pytest.raises(UserError, match="cannot be kept in"):
        Compiler(library / "binaries", plugin_folder=tmp_path)


KINDS = {
    instructions.MATRIX: r"v_(wmma|swmmac|mfma|smfmac)_",
    instructions.NARROW_LOAD: r"ds_(load|read)_[ui](8|16)",
    instructions.NARROW_STORE: r"ds_(store|write)_b(8|16)(_|$)",
    instructions.LDS: r"ds_",
    instructions.SCRATCH: r"scratch_",
    instructions.MEMORY: r"(global|flat|buffer)_",
    instructions.BRANCH: r"s_c?branch",
    instructions.VECTOR: r"v_",
    instructions.SCALAR: r"s_",
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["product", "spilling"])
def test_the_walker_agrees_with_llvm(compiler, arch, name):
    """Every instruction's place, length and kind. Needs llvm-objdump (apt install llvm-22)."""
    path = compiler.compile(unit(name, arch)).kernels[0].binary
    (kernel,) = binary.read(path)
    lines = assembly.disassemble(path, kernel.name)
    found = list(instructions.walk(kernel.code, arch))
    assert [(i.at, i.size) for i in found] == [(line.at, line.size) for line in lines]
    for i, line in zip(found, lines, strict=True):
        opcode = line.text.split()[0]
        kind = next(kind for kind, form in KINDS.items() if re.match(form, opcode))
        assert i.kind == kind, line


@pytest.mark.slow
def test_an_estimate_grows_with_the_work(compiler):
    """Needs llvm-mca. Twice the tile is eight times the product of a pass."""
    units = [unit("product", block=block, along_k=False) for block in (32, 64)]
    rows = [budget.measure(compiler, "product", one)[0] for one in units]
    small, large = (row.cycles * row.loop_matrix for row in rows)
    assert 1.2 * small < large


def run_table(*arguments):
    tool = Path(__file__).parents[2] / "tools" / "rocm_table.py"
    command = [sys.executable, str(tool), "--arch", "gfx1100", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_table_tool_fails_on_a_spill():
    good = run_table("--check", "--unit", f"{UNITS}:product", "--arguments", '{"size": 256}')
    assert good.returncode == 0, good.stderr
    (row,) = budget.parse(good.stdout)
    assert row.kernel == "product" and row.matrix
    bad = run_table("--check", "--unit", f"{UNITS}:spilling")
    assert bad.returncode == 1 and "vector registers are spilled" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "gfx1030"], "'gfx1030' is no known AMD card"),
        (["--only", "nothing of that name"], "no case has 'nothing of that name'"),
        (["--unit", "a:b", "--arguments", "[1]"], "not an object of JSON"),
        (["--unit", "a:b", "--write"], "--write is for the project's own kernels"),
    ],
)
def test_the_table_tool_says_what_it_cannot_do(arguments, said):
    result = run_table(*arguments)
    assert result.returncode == 2 and said in result.stderr
    assert "Traceback" not in result.stderr and not result.stdout


def test_the_table_tool_fails_on_what_does_not_compile():
    result = run_table("--unit", f"{UNITS}:broken")
    assert result.returncode == 1
    assert "this unit cannot be built" in result.stderr and "Traceback" not in result.stderr
    result = run_table("--unit", "only_a_name")
    assert result.returncode == 1 and "neither package.module:name" in result.stderr


@pytest.mark.parametrize("arch, width", [("gfx1100", 64), ("gfx1100", 128), ("gfx942", 64)])
def test_attention_to_a_shared_prompt(compiler, arch, width):
    """One more loop around each kernel's, for a query's own segment and for its prompt, costs no
    registers to speak of."""
    rows = budget.measure(compiler, "", unit("shared_prefix", arch, width=width), estimate=False)
    rows = [row for row in rows if row.kernel.startswith("attention_")]
    assert {"attention_forward", "attention_d_queries"} < {row.kernel for row in rows}
    for row in rows:
        assert row.matrix > 0 and row.spills <= 1, row
