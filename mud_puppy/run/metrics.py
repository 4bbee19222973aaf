"""Where a run's numbers go: metrics.jsonl always, TensorBoard or Weights & Biases when asked for.

One line of metrics.jsonl is one call of `write`: {"step": 20, "loss": 2.1, ...}. A number that is
not finite is null there, so every JSON reader takes the file. A run resumed at step N first drops
what the killed run wrote after N, so no step is there twice.
"""

import importlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from mud_puppy.errors import UserError, nearest

LOG_WITH = ("none", "tensorboard", "wandb")


@runtime_checkable
class MetricsWriter(Protocol):
    """Takes the numbers of one step, at non-descending steps; `close` when the run ends.

    A value may be a Python, numpy or JAX scalar.
    """

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_metrics(
    directory: Path,
    log_with: str = "none",
    resume_step: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> MetricsWriter:
    """The writer for a run in `directory`: metrics.jsonl, and what `log_with` names.

    resume_step: the step that the run goes on from; None starts afresh. config: shown by W&B.
    """
    if log_with not in LOG_WITH:
        hint = nearest(log_with, LOG_WITH)
        raise UserError(f"--log-with {log_with}: expected one of {', '.join(LOG_WITH)}.{hint}")
    writers: list[MetricsWriter] = []
    if log_with == "tensorboard":
        writers.append(TensorBoard(directory, resume_step))
    if log_with == "wandb":
        writers.append(WandB(directory, resume_step, config or {}))
    return Several([JsonLines(directory / "metrics.jsonl", resume_step), *writers])


class Several:
    """Hands every call to each of several writers."""

    def __init__(self, writers: Sequence[MetricsWriter]) -> None:
        self._writers = writers

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class JsonLines:
    """metrics.jsonl: each line is written out at once, so a killed run loses none of them."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        kept = [] if resume_step is None else _until(path, resume_step)
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(map(_line, kept)))
            os.replace(fresh, path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": step} | {name: _number(value) for name, value in values.items()}
        try:
            self._file.write(_line(row).encode())
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under `directory`/tensorboard, written by tensorboardX."""

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        purge = None if resume_step is None else resume_step + 1
        module = _import("tensorboardX", "tensorboard")
        self._writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, kept under `directory`/wandb.

    Offline unless a key is known or WANDB_MODE says otherwise; `wandb sync` uploads it later. The
    run's id is in `directory`/wandb_id, and a resumed run goes on under it.
    """

    def __init__(self, directory: Path, resume_step: int | None, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        directory.mkdir(parents=True, exist_ok=True)
        known = directory / "wandb_id"
        if resume_step is None or not known.exists():
            known.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mud_puppy"),
            name=os.environ.get("WANDB_NAME", directory.absolute().name),
            dir=str(directory),
            config=dict(config),
            id=known.read_text(),
            resume="allow",
            mode=os.environ.get("WANDB_MODE") or _mode(wandb),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; none if there is no such file.

    A last line that a kill cut short is left out; any other bad line is a UserError.
    """
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is cut short
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a line of metrics: {line[:80]!r}; correct or remove the file"
            ) from error
        rows.append(row)
    return rows


def _until(path: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_metrics(path) if row["step"] <= step]


def _mode(wandb: ModuleType) -> str:
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _number(value: Any) -> int | float | None:
    """`value` as JSON may hold it."""
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--log-with {extra} needs {module}: pip install 'mud_puppy[{extra}]'"
        ) from error
