"""Every kernel's numbers on gfx1100, forward and VJP, by the emulator (see `emulate`).

Needs TINYGRAD_DIR (a tinygrad checkout), MUD_PUPPY_ROCM (XLA's ROCm plugin), clang, and the shared
folder's harness. `emulator_h100.json` holds what the same kernels gave on an H100
(`python tests/kernels/emulate.py --device`), for those cases that were run there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.emulator_cases import CASES

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
H100 = json.loads((HERE / "emulator_h100.json").read_text())
# Results rounded to bfloat16 differ by 1.7e-3 of their norm at best; products of rounded
# probabilities, and gradients of such, by two or three times as much.
LIMIT = 6e-3


def emulate(*arguments):
    assert "TINYGRAD_DIR" in os.environ, "set TINYGRAD_DIR to a checkout of tinygrad/tinygrad"
    result = subprocess.run(
        [sys.executable, HERE / "emulate.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_gfx1100_computes_what_the_reference_does(case):
    found = emulate(case)
    assert found["kernels"], "no kernel was emulated"
    assert max(found["errors"].values()) < LIMIT, found
    for leaf, error in H100.get(case, {}).items():
        assert found["errors"][leaf] <= 2 * error, (leaf, error, found)


def test_a_spoilt_kernel_shows():
    found = emulate("--mutate", next(iter(CASES)))
    assert max(found["errors"].values()) > LIMIT
