"""The verbs of the command line, a file each for what belongs together.

A verb is a dataclass of keys (its flags) and a function that calls the room which does the work.
jax and the rooms are imported inside the functions, so that help and errors come at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mud_puppy.commands.doctor import Doctor, run_doctor
from mud_puppy.commands.measure import Eval, run_eval
from mud_puppy.commands.plan import Plan, run_plan
from mud_puppy.commands.preview import Preview, run_preview
from mud_puppy.commands.quantize import Quantize, run_quantize
from mud_puppy.commands.score import Score, run_score
from mud_puppy.commands.talk import Chat, Generate, run_chat, run_generate
from mud_puppy.commands.write import Export, Merge, run_export, run_merge


@dataclass(frozen=True)
class Command:
    """A verb: its keys, which of them may stand without a flag, and what it does.

    of_config: it also takes a run's config and every flag of it; run(keys, config, flags) then.
    """

    keys: type
    positional: tuple[str, ...]
    run: Callable[..., None]
    of_config: bool = False

    @property
    def help(self) -> str:
        """Its one line in `mud-puppy --help`."""
        return (self.keys.__doc__ or "").splitlines()[0]


COMMANDS = {
    "plan": Command(Plan, ("model", "dataset"), run_plan, of_config=True),
    "preview": Command(Preview, ("dataset",), run_preview, of_config=True),
    "merge": Command(Merge, ("model", "adapter"), run_merge),
    "eval": Command(Eval, ("model",), run_eval),
    "score": Command(Score, ("model", "dataset"), run_score),
    "quantize": Command(Quantize, ("model",), run_quantize),
    "export": Command(Export, ("run",), run_export),
    "generate": Command(Generate, ("model",), run_generate),
    "chat": Command(Chat, ("model",), run_chat),
    "doctor": Command(Doctor, (), run_doctor),
}
