"""The output folder, looked at before anything runs."""

import tempfile
from pathlib import Path

from mud_puppy.config.keys import Config
from mud_puppy.errors import UserError


def check_output(config: Config) -> Path:
    """The run's folder, made if it is missing; nothing in it is changed.

    Raises UserError when it cannot be written, or holds something and neither resume nor overwrite
    is set.
    """
    if not (config.resume or config.overwrite):
        refuse_filled(config.output, "go on with --resume, replace it with --overwrite, or ")
    return writable(config.output)


def refuse_filled(output: str, ways_out: str = "") -> None:
    """Raise UserError when the folder `output` holds something."""
    path = Path(output)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"output {output}: is not empty; {ways_out}name another folder.")


def writable(output: str) -> Path:
    """The folder, made if it is missing; UserError when no file can be written in it."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise UserError(f"output {output}: is a file; name a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"output {output}: cannot be written ({error.strerror}).") from None
    return path
