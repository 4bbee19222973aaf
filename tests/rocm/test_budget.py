"""The table: what is a fault, what is worse, and that it can be written and read."""

from dataclasses import replace

from mud_puppy.rocm import budget
from mud_puppy.rocm.budget import Row

GOOD = Row(
    arch="gfx1100", case="forward bf16 128", kernel="flash_forward", vgprs=224, spills=0,
    scratch_bytes=0, lds_bytes=16384, threads=256, waves=6, dots=2, matrix=24, narrow=0,
    loop=400, loop_matrix=24, work=16.0, cycles=25.5,
)  # fmt: skip


def test_a_good_row_has_no_fault():
    assert budget.faults(GOOD) == []
    assert budget.faults(replace(GOOD, dots=0, matrix=0)) == []


def test_spills_lds_lost_matrix_instructions_and_narrow_loads_are_faults():
    bad = replace(GOOD, spills=3, lds_bytes=65537, matrix=0, narrow=160)
    spills, lds, matrix, narrow = budget.faults(bad)
    assert "3 vector registers" in spills and "65536 fit" in lds and "2 matrix" in matrix
    assert "160 LDS loads" in narrow
    assert budget.faults(replace(GOOD, arch="gfx950", lds_bytes=163840)) == []


def test_worse_than_before():
    assert budget.worse(GOOD, GOOD) == []
    assert budget.worse(replace(GOOD, waves=8, cycles=20.0), GOOD) == []
    slower = replace(GOOD, waves=4, scratch_bytes=64, cycles=27.0)
    assert budget.worse(slower, GOOD) == [
        "scratch_bytes: 64, it was 0",
        "waves: 4, it was 6",
        "cycles: 27.0, it was 25.5",
    ]
    # without LLVM there is no estimate, and a little is noise
    assert budget.worse(replace(GOOD, cycles=None), GOOD) == []
    assert budget.worse(replace(GOOD, cycles=26.0), GOOD) == []


def test_repeated_work_costs():
    assert GOOD.cycles_per_work == 25.5 * 24 / 16
    assert replace(GOOD, cycles=None).cycles_per_work is None


def test_the_table_is_read_back():
    table = [GOOD, replace(GOOD, arch="gfx942", kernel="decode", cycles=None)]
    assert budget.parse("# A page\n\n" + budget.render(table) + "\nmore\n") == table


def test_every_case_of_every_kernel_can_be_named():
    """No compiler: the cases exist, their names differ, and every architecture has them."""
    for arch in ("gfx1100", "gfx942"):
        names = [name for name, unit in budget.cases(arch)]
        assert len(set(names)) == len(names)
