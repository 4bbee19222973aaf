"""The output folder: looked at before anything runs, and cleared where that was asked for."""

import os
import shutil
import tempfile
from pathlib import Path

from mud_puppy.config.keys import Config
from mud_puppy.errors import UserError


def check_output(config: Config) -> Path:
    """The run's folder, made if it is missing; nothing in it is changed.

    Raises UserError when it cannot be written; when it holds something and neither resume nor
    overwrite is set; when there is something to resume from but not a run; and when overwrite would
    remove what the run starts from.
    """
    if config.resume:
        _refuse_foreign(config.output)
    elif config.overwrite:
        _refuse_own_source(config)
    else:
        return empty(config.output, "go on with --resume, replace it with --overwrite, or ")
    return writable(config.output)


def empty(output: str, ways_out: str = "") -> Path:
    """`writable`, and UserError when the folder holds something."""
    if _held(output):
        raise UserError(f"output {output}: is not empty; {ways_out}name another folder.")
    return writable(output)


def writable(output: str) -> Path:
    """The folder, made if it is missing; UserError when no file can be written in it."""
    path = Path(output).expanduser()
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"output {output}: is a file; name a folder.")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _unusable(output, error) from None
    return path


def new_file(output: str) -> Path:
    """The path of a file that is not there yet; nothing is made.

    Raises UserError where something is, or where no file can be written.
    """
    path = Path(output).expanduser()
    try:
        if path.is_dir():
            raise UserError(f"output {output}: is a folder; name a file.")
        if path.exists() or path.is_symlink():
            raise UserError(f"output {output}: exists; name another file.")
        # The folders that are missing are made when it is written.
        with tempfile.TemporaryFile(dir=next(p for p in path.parents if p.exists())):
            pass
    except OSError as error:
        raise UserError(
            f"output {output}: cannot be written ({error.strerror}); name another file."
        ) from None
    return path


# What a run writes. --overwrite removes this and nothing else that lies in the folder.
_WRITTEN = (
    "checkpoint-[0-9]*",
    "merged",
    "qat_int[48]",
    "gptq",
    "reference",
    "tensorboard",
    "wandb",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "config.yaml",
    "generation_config.json",
    "metrics.jsonl",
    "run.json",
    "samples.json",
    "wandb_id",
    "report.html",
)


def clear_output(output: Path) -> None:
    """--overwrite: nothing of an earlier run is left to be mistaken for this one's."""
    for path in {path for pattern in _WRITTEN for path in output.glob(pattern)}:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_foreign(output: str) -> None:
    """A run writes config.yaml first, so a folder without one holds something else."""
    held = _held(output)
    if held and not any(name == "config.yaml" or name.startswith("checkpoint-") for name in held):
        raise UserError(
            f"output {output}: holds no run to resume (no config.yaml and no checkpoint, but "
            f"{min(held)}); name the run's folder."
        )


def _refuse_own_source(config: Config) -> None:
    output = _real(config.output)
    for key in ("model", "adapter", "teacher", "teacher_logits"):
        source = config.__dict__[key]
        if source is not None and _real(source).is_relative_to(output):
            raise UserError(
                f"{key} {source}: lies in the output folder, which --overwrite clears; name "
                "another output folder."
            )


def _real(source: str) -> Path:
    return Path(os.path.realpath(os.path.expanduser(source)))


def _held(output: str) -> list[str]:
    """The names in the folder; none where there is no folder."""
    path = Path(output).expanduser()
    try:
        return [inner.name for inner in path.iterdir()] if path.is_dir() else []
    except OSError as error:
        raise _unusable(output, error) from None


def _unusable(output: str, error: OSError) -> UserError:
    return UserError(f"output {output}: cannot be written ({error.strerror}); name another folder.")
