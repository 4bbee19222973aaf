"""The verbs of the command line, a file each for what belongs together.

A verb is a dataclass of keys (its flags) and a function that calls the room which does the work.
jax and the rooms are imported inside the functions, so that help and errors come at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mud_puppy.commands.measure import Eval, Preview, run_eval, run_preview
from mud_puppy.commands.quantize import Quantize, run_quantize
from mud_puppy.commands.talk import Chat, Generate, run_chat, run_generate
from mud_puppy.commands.write import Export, Merge, run_export, run_merge


@dataclass(frozen=True)
class Command:
    """A verb: its keys, which of them may stand without a flag, and what it does."""

    keys: type
    positional: tuple[str, ...]
    run: Callable[[Any], None]

    @property
    def help(self) -> str:
        """Its one line in `mud-puppy --help`."""
        return (self.keys.__doc__ or "").splitlines()[0]


COMMANDS = {
    "preview": Command(Preview, ("dataset",), run_preview),
    "merge": Command(Merge, ("model", "adapter"), run_merge),
    "eval": Command(Eval, ("model",), run_eval),
    "quantize": Command(Quantize, ("model",), run_quantize),
    "export": Command(Export, ("run",), run_export),
    "generate": Command(Generate, ("model",), run_generate),
    "chat": Command(Chat, ("model",), run_chat),
}
