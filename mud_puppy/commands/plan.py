"""plan: will a run fit on a card, compiled without it."""

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mud_puppy.config.keys import Config
from mud_puppy.config.schema import AT_LEAST_1, POSITIVE, key
from mud_puppy.errors import UserError

_flag = partial(key, "plan")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say whether a run fits on a card, from its compiled step; no card and no weights needed."""

    devices: int | None = _flag(
        None, "how many of the target; null: 1 of a card, all of those here", AT_LEAST_1
    )
    shape: str | None = _flag(None, "a known model (llama-3.1-8b) instead of MODEL's config.json")
    memory_gib: float | None = _flag(
        None, "memory of each device that a run may take; null: 95 % of a card's", POSITIVE
    )
    search: bool = _flag(True, "look for the largest batch, the longest sequence, and what helps")
    json: bool = _flag(False, "print JSON")


# A plan reads no data and writes nothing.
_UNUSED = {"dataset": "-", "output": "-"}


def run_plan(args: Plan, source: Any, flags: Mapping[str, Any]) -> None:
    """Prints the plan of the config `source` with `flags` on top."""
    unused = dict(_UNUSED) if args.shape is None else {"model": args.shape, **_UNUSED}
    if args.shape is not None and "model" in flags:
        raise UserError(
            f"--shape {args.shape} and MODEL {flags['model']} are both given; remove one"
        )
    config = Config.load(source, flags, unused)
    from mud_puppy.plan import plan, text, values

    # Ended by a signal, the compilers and what they keep in /tmp go too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = plan(
        config,
        devices=args.devices,
        shape=args.shape,
        memory_gib=args.memory_gib,
        search=args.search,
    )
    print(json.dumps(values(found), indent=2) if args.json else text(found))
