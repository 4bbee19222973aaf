"""merge and export: write a model or adapter that exists as other programs load it."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mud_puppy.config.adapters import Stored
from mud_puppy.config.keys import DTYPES, MODEL, REMOTE_CODE
from mud_puppy.config.output import empty
from mud_puppy.config.schema import AT_LEAST_1, REQUIRED, key
from mud_puppy.errors import UserError

_flag = partial(key, "flags")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Add the adapter to the model's weights and write the merged model."""

    model: str = _flag(REQUIRED, MODEL)
    adapter: str = _flag(REQUIRED, "PEFT adapter folder")
    output: str = _flag(REQUIRED, "folder for the merged model")
    merge_precision: Stored | None = _flag(
        None, "type or format of the merged weights; null: as the model's are stored"
    )
    trust_remote_code: bool = _flag(False, REMOTE_CODE)


def run_merge(args: Merge) -> None:
    """Writes the merged model."""
    folder = empty(args.output)
    from mud_puppy.results import merge_adapter
    from mud_puppy.weights import Scheme

    how = args.merge_precision
    scheme = None if how is None or how in DTYPES else Scheme(how)
    dtype, trusted = how and DTYPES.get(how), args.trust_remote_code
    merge_adapter(args.model, args.adapter, folder, dtype, scheme, trusted)
    print(f"merged model: {args.output}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model or adapter of a run's checkpoint as other programs load it."""

    run: str = _flag(REQUIRED, "a run's output folder, or one checkpoint-N folder in it")
    output: str = _flag(REQUIRED, "folder for the model or adapter")
    step: int | None = _flag(None, "the checkpoint's step; null: the last", AT_LEAST_1)
    merge_lora: bool = _flag(False, "write the merged model instead of the adapter")


def run_export(args: Export) -> None:
    """Writes the checkpoint's model or adapter."""
    run, step = _run_and_step(args)
    folder = empty(args.output)
    from mud_puppy.results import export_run

    export_run(run, folder, step=step, merge=args.merge_lora)
    print(f"exported: {args.output}")


def _run_and_step(args: Export) -> tuple[str, int | None]:
    folder = Path(args.run)
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if named is None:
        return args.run, args.step
    if args.step is not None:
        raise UserError(f"--step: {args.run} names the step already; remove one of the two.")
    return str(folder.parent), int(named[1])
