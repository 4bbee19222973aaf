"""Tile sizes by op and chip, from tables/<op>.json.

    {"gfx1100": {"device": ..., "versions": ..., "date": ..., "method": ...,
                 "tiles": {"forward bfloat16 128": {"q_block": 64, ...}, ...}}, ...}

NVIDIA's entries are timed on the card that they name; AMD's are chosen by reading the compiled
binary (tools/) and were never timed. A chip without an entry takes that of its nearest relative and
the log says so once.
"""

import functools
import json
import logging
from pathlib import Path

from mud_puppy.kernels import choice, target

TABLES = Path(__file__).with_name("tables")
# The interpreter's tiles do not matter for speed; it takes RDNA3's, which the emulator also runs.
RELATIVES = {
    "gfx10": "gfx1100", "gfx11": "gfx1100", "gfx12": "gfx1201", "gfx90a": "gfx90a",
    "gfx950": "gfx950", "gfx9": "gfx942", "sm": "sm90", "cpu": "gfx1100",
}  # fmt: skip


def tiles(op: str, key: str) -> dict[str, int]:
    """The tuned configuration of `op` for `key` (direction, dtype, head size, ...) on this chip.

    Raises KeyError where neither the chip nor its relative has an entry for the key.
    """
    arch = target.current().arch
    table = _table(op)
    chosen = arch if arch in table else _relative(arch)
    if chosen != arch and arch != "cpu":
        choice.say(
            logging.INFO, f"{op}: no tiles were tuned for {arch}; those of {chosen} are used"
        )
    return table[chosen]["tiles"][key]


def _relative(arch: str) -> str:
    for prefix, known in RELATIVES.items():
        if arch.startswith(prefix):
            return known
    raise KeyError(f"no tiles were tuned for {arch} or a relative of it: {', '.join(RELATIVES)}")


@functools.cache
def _table(op: str) -> dict:
    return json.loads((TABLES / f"{op}.json").read_text())
