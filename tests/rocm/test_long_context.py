"""XLA's ROCm compiler takes the levers of long context: inputs on the host, tiles of the row."""

from pathlib import Path

import pytest

from mud_puppy.rocm.compile import Compiler, Unit
from tests.rocm.long_context import SHAPE

pytestmark = pytest.mark.rocm

STEP = f"{Path(__file__).with_name('long_context.py')}:step"
TOKENS = 16384
INPUTS = SHAPE["num_hidden_layers"] * TOKENS * SHAPE["hidden_size"] * 2  # bytes in bfloat16


@pytest.fixture(scope="module")
def memory():
    with Compiler() as compiler:

        def planned(tile: int | None, remat: str, card: str = "gfx1100"):
            arguments = {"tokens": TOKENS, "tile": tile, "remat": remat}
            return compiler.compile(Unit(STEP, arguments, card)).memory

        yield planned


def test_layer_inputs_leave_the_card(memory):
    """All of them and nothing else is in the host's memory, and off the card."""
    full, offload = memory(2048, "full"), memory(2048, "offload")
    assert full.host == 0 and offload.host == INPUTS
    assert full.needed - offload.needed > 0.9 * INPUTS


def test_tiles_bound_the_temporaries(memory):
    whole, tiled = memory(None, "offload"), memory(2048, "offload")
    width = TOKENS * SHAPE["intermediate_size"] * 2
    assert tiled.temp < 0.6 * whole.temp and whole.temp - tiled.temp > 2 * width


@pytest.mark.parametrize("card", ["gfx1151", "gfx1201", "gfx90a", "gfx942"])
def test_other_architectures_compile_both(memory, card):
    assert memory(2048, "offload", card).host == INPUTS
