"""Every kernel's numbers on gfx1100, forward and VJP, by the emulator (see `emulate`).

Needs TINYGRAD_DIR (a tinygrad checkout), MUD_PUPPY_ROCM (XLA's ROCm plugin), clang, and the shared
folder's harness. `emulator_h100.json` holds what the same kernels gave on an H100
(`python tests/kernels/emulate.py --device`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mud_puppy.rocm import budget
from tests.kernels.emulator_cases import CASES

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "rocm_kernels.md"
H100 = json.loads((HERE / "emulator_h100.json").read_text())
# Results rounded to bfloat16 differ by 1.7e-3 of their norm at best; products of rounded
# probabilities, and gradients of such, by two or three times as much.
LIMIT = 6e-3
FLOAT32 = 2.0**-23  # errors below its rounding are chance


def emulate(*arguments):
    """{case: its line}, and what the emulator wrote to stderr."""
    assert "TINYGRAD_DIR" in os.environ, "set TINYGRAD_DIR to a checkout of tinygrad/tinygrad"
    command = [sys.executable, HERE / "emulate.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}, result.stderr


@pytest.fixture(scope="module")
def emulated(request):
    """The cases of the tests that were asked for, in one process: it learns each instruction once,
    which takes longer than most cases."""
    tests = [x for x in request.session.items if "emulated" in getattr(x, "fixturenames", ())]
    asked = {x.callspec.params["case"] if hasattr(x, "callspec") else None for x in tests}
    return emulate(*(CASES if None in asked else [case for case in CASES if case in asked]))


@pytest.mark.parametrize("case", CASES)
def test_gfx1100_computes_what_the_reference_does(case, emulated):
    lines, stderr = emulated
    assert "errors" in lines.get(case, {}), f"{lines.get(case)}\n{stderr[-3000:]}"
    found = lines[case]
    assert found["kernels"], "no kernel was emulated"
    assert max(found["errors"].values()) < LIMIT, found
    for leaf, error in H100[case].items():
        assert found["errors"][leaf] <= 2 * max(error, FLOAT32), (leaf, error, found)


def test_every_tuned_kernel_is_emulated(emulated):
    tuned = {row.kernel for row in budget.parse(TABLE.read_text()) if row.arch == "gfx1100"}
    ran = {kernel for line in emulated[0].values() for kernel in line["kernels"]}
    assert tuned - ran == {"mha_forward"}  # JAX's own, there for comparison


def test_a_spoilt_kernel_shows():
    case = next(iter(CASES))
    lines, _ = emulate("--mutate", case)
    assert max(lines[case]["errors"].values()) > LIMIT
