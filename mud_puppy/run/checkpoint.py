"""Checkpoints of a run: written in the background, complete or absent, checked before use.

A checkpoint is a folder `checkpoint-<step>`: `state/` (Orbax, every array of the state),
`meta.json` (step, score, what the run wants to remember, and the type of every leaf) and SHA256SUMS
over both. It is written as `checkpoint-<step>.tmp` and renamed when all of it is on the disk, so a
kill at any moment leaves the earlier checkpoints and at most a `.tmp`, which nothing reads and the
next save removes. One process writes; several hosts are not supported. See docs/checkpoints.md.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from mud_puppy.errors import UserError
from mud_puppy.run import checksums, leaves

_NAME = re.compile(r"checkpoint-(\d+)")
_SAVE_TIMEOUT_S = 6 * 3600  # Orbax would give up after 600 s; a large model may need longer
_log = logging.getLogger(__name__)
# Orbax prints a traceback of what it raises as well; a user gets our one line instead.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Restored(NamedTuple):
    """A checkpoint that was read: the step it was saved at, the state, and the `meta` of then."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder. Keeps the newest `keep` and the one with the lowest score.

    A save that fails raises its UserError from the next call of any method here. A run either
    starts in a folder without checkpoints or calls `restore` before its first `save`.
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        if keep < 1:
            raise UserError(f"the number of checkpoints to keep must be at least 1, not {keep}")
        self._directory = Path(directory).absolute()
        self._keep = keep
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)  # weights hardly compress
        self._orbax = ocp.AsyncCheckpointer(handler, timeout_secs=_SAVE_TIMEOUT_S)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._current: set[int] = set()  # steps that this run wrote or went on from
        self._abandoned: set[int] = set()  # steps later than the one that this run went on from

    def save(
        self, step: int, state: Any, meta: dict[str, Any] | None = None, score: float | None = None
    ) -> None:
        """Copies `state` to the host and returns; the rest happens in the background.

        state: a pytree of arrays (of any sharding), typed random keys, numpy arrays and Python
        scalars; its buffers may be donated at once. meta: JSON-able, `restore` gives it back.
        score: lower is better (evaluation loss); the best one is kept. Waits for a save that is
        under way. A step that this run has already saved is not written again.
        """
        self.wait()
        if step in self._current and step in self.steps():
            return
        if not self._current and self.steps():
            raise UserError(
                f"{self._directory} holds checkpoints of another run "
                f"(newest: step {max(self.steps())}): resume it, or write to another output folder"
            )
        score = None if score is None or not math.isfinite(score) else float(score)
        arrays, record = leaves.pack(state)
        text = json.dumps({"step": step, "score": score, "meta": meta or {}} | record, indent=1)
        tmp = self._path(step).with_suffix(".tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for leftover in self._directory.glob("checkpoint-*.tmp"):
                shutil.rmtree(leftover)
            _check_room(self._directory, arrays)
            self._orbax.save(tmp / "state", args=ocp.args.PyTreeSave(arrays))
        except (OSError, ValueError) as error:
            raise self._give_up(step, tmp, error) from error
        self._pending = self._worker.submit(self._commit, step, tmp, text)

    def wait(self) -> None:
        """Returns when nothing is being written; call it before the process ends."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending; `restore` checks for damage."""
        if not self._directory.is_dir():
            return []
        names = [_NAME.fullmatch(path.name) for path in self._directory.iterdir() if path.is_dir()]
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> int | None:
        """The newest step with a complete checkpoint, or None; waits for a save under way."""
        self.wait()
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest score (the earliest of equals), or None without scores."""
        self.wait()
        return self._best(set(self.steps()))

    def restore(self, target: Any, step: int | None = None) -> Restored:
        """The checkpoint of `step`, or without one the newest that is not damaged.

        target: the state's pytree with ShapeDtypeStructs (or arrays) as leaves, whose structure and
        shardings the result has, and Python scalars where the state had them. A leaf without a
        sharding comes back uncommitted. A damaged checkpoint is passed over with a warning unless
        `step` names it. Raises UserError if none is usable, the named one is absent or damaged, or
        it does not fit `target`. Checkpoints later than the one that a run goes on from are removed
        when the run has written its own first one.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self._path(step)} does not exist; {_there_are(steps)}")
        damage: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(steps):
            found = checksums.find_damage(self._path(candidate))
            if found is None:
                return self._read(target, candidate, damage)
            damage[candidate] = found
        if not damage:
            raise UserError(f"no checkpoint in {self._directory}: there is nothing to resume")
        others = [s for s in steps if s not in damage]
        raise UserError(f"{self._damaged(damage)}; {_there_are(others)}")

    def replace(self, state: Any, step: int | None = None) -> Restored:
        """`restore` in place of `state`, arrays that are freed first: two may not fit."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        jax.tree.map(lambda x: x.delete(), state)
        return self.restore(target, step)

    def _read(self, target: Any, step: int, damage: dict[int, str]) -> Restored:
        path = self._path(step)
        if damage:
            _log.warning("%s; %s is used instead", self._damaged(damage), path.name)
        record = json.loads((path / "meta.json").read_text())
        leaves.check_fit(record, target, str(path))
        shapes, places = leaves.requests(target)
        args = ocp.args.PyTreeRestore(item=shapes, restore_args=places)
        arrays = self._orbax.restore(path / "state", args=args)
        if not self._current:  # the run goes on from here: what came after is another course
            self._current = {step}
            self._abandoned = {later for later in self.steps() if later > step}
        return Restored(step, leaves.unpack(target, arrays, record), record["meta"])

    def _commit(self, step: int, tmp: Path, meta: str) -> None:
        """The background half of `save`: completes `tmp` and makes it appear under its name."""
        path = self._path(step)
        try:
            self._orbax.wait_until_finished()
            (tmp / "meta.json").write_text(meta)
            checksums.seal(tmp)
            _remove(path)  # damaged or abandoned: what this run went on from is another
            os.rename(tmp, path)
            checksums.flush(self._directory)
        except Exception as error:
            raise self._give_up(step, tmp, error) from error
        self._current.add(step)
        try:
            self._prune(step)
        except OSError as error:
            raise UserError(f"cannot remove an old checkpoint: {error}") from error

    def _prune(self, step: int) -> None:
        """Removes what is neither among the newest, nor best, nor the just written `step`."""
        here = set(self.steps())
        course = here - (self._abandoned - {step})
        kept = {step, self._best(course), *sorted(course)[-self._keep :]}
        self._abandoned = set()
        for old in here - kept:
            _remove(self._path(old))

    def _best(self, steps: set[int]) -> int | None:
        scored = [(score, s) for s in sorted(steps) if (score := _score(self._path(s))) is not None]
        return min(scored)[1] if scored else None

    def _path(self, step: int) -> Path:
        return self._directory / f"checkpoint-{step}"

    def _damaged(self, damage: dict[int, str]) -> str:
        return "; ".join(f"{self._path(s)} is damaged: {what}" for s, what in damage.items())

    def _give_up(self, step: int, tmp: Path, error: Exception) -> UserError:
        """Frees what a failed save wrote, and says in one line why it failed and what is left."""
        shutil.rmtree(tmp, ignore_errors=True)
        # TensorStore reports the system's error number inside its text.
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number:
            reason = os.strerror(int(number[1]))
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = str(error)
        earlier = [s for s in self.steps() if s != step]
        left = (
            f"{self._path(max(earlier)).name} is intact" if earlier else "there is no earlier one"
        )
        return UserError(f"cannot write checkpoint {self._path(step)}: {reason}; {left}")


def _check_room(directory: Path, arrays: dict[str, Any]) -> None:
    """Asked before: TensorStore, when it finds the disk full, prints tracebacks beside our line."""
    if shutil.disk_usage(directory).free < sum(array.nbytes for array in arrays.values()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _remove(path: Path) -> None:
    """Removes a checkpoint if it exists; at no moment is half of it there under its name."""
    doomed = path.with_suffix(".removed.tmp")
    if path.exists():
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _score(path: Path) -> float | None:
    """The score in a checkpoint's meta.json; None if it has none, or the file is damaged."""
    try:
        return json.loads((path / "meta.json").read_text())["score"]
    except (OSError, ValueError, KeyError):
        return None


def _there_are(steps: list[int]) -> str:
    listed = ", ".join(map(str, steps))
    return f"there are checkpoints of steps {listed}" if steps else "there are no others"
