"""The training loop, one for every method: batches in, state forward, numbers and checkpoints out.

It owns no mathematics (that is `step.py`) and no files (`checkpoint.py`, `metrics.py`); it decides
when to log, evaluate, save and stop. Evaluation and checkpoints come after the update that they are
named for, so a run resumed from checkpoint N goes on exactly as if it had never ended.
"""

import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.run.checkpoint import Checkpoints
from mud_puppy.run.step import State

Tree = Any
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """When things happen, in updates. None: never (eval_steps, save_steps), or no patience."""

    total_steps: int
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    patience: int | None = None

    def spent(self, course: "Course") -> bool:
        return self.patience is not None and course.worse >= self.patience


@dataclass(frozen=True)
class Course:
    """What a run remembers beside its state: the best evaluation, and how many since were worse."""

    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0

    def after(self, loss: float, step: int) -> "Course":
        best = self.best_loss
        # A first evaluation that is no number is beaten by any that is one.
        if best is None or loss < best or math.isnan(best):
            return Course(loss, step, 0)
        return replace(self, worse=self.worse + 1)


@dataclass(frozen=True)
class Ended:
    """How a run ended: "done", "early stopping" or "signal"; the last state and the course."""

    reason: str
    state: State
    course: Course


# Hears of every logged line: metrics.jsonl, TensorBoard, the progress bar.
Listener = Callable[[int, dict[str, Any]], None]


def fit(
    step: Callable[[State, Batch], tuple[State, Tree]],
    state: State,
    batches: Iterator[tuple[int, Batch]],
    evaluate: Callable[[State], dict[str, float]] | None,
    plan: Plan,
    checkpoints: Checkpoints,
    listen: Listener,
    course: Course,
    sample: Callable[[State, int, Batch], Batch] | None = None,
) -> Ended:
    """Runs from the state's step to the plan's end. `batches` yields (step number, batch).
    sample(state, step number, batch): the batch as the policy of that step makes it
    (`run.rollout`)."""
    if plan.spent(course):  # a run that had ended so, and is resumed
        return Ended("early stopping", state, course)
    window = Window()
    with _signals() as stop:
        for number, batch in batches:
            batch = batch if sample is None else sample(state, number, batch)
            state, metrics = step(state, batch)
            done = number + 1
            last = done == plan.total_steps
            window.add(metrics, batch)
            if done % plan.logging_steps == 0 or _due(done, plan.save_steps, last) or stop.is_set():
                listen(done, _finite(window.close(), done, checkpoints))
            improved = False
            if evaluate is not None and _due(done, plan.eval_steps, last):
                with window.paused():
                    values = evaluate(state)
                listen(done, values)
                course = course.after(values["eval_loss"], done)
                improved = course.best_step == done
            spent, stopped = plan.spent(course), stop.is_set()
            if _due(done, plan.save_steps, last) or improved or spent or stopped:
                score = course.best_loss if improved else None
                with window.paused():
                    checkpoints.save(done, state, asdict(course), score)
            if spent or stopped:
                reason = "early stopping" if spent else "signal"
                break
        else:
            reason = "done"
        checkpoints.wait()
    return Ended(reason, state, course)


class Window:
    """Sums of metrics between two logged lines; nothing is fetched from the device before.

    The clock starts behind the first step, which was compiled, and stands while `paused`.
    """

    def __init__(self) -> None:
        self._metrics: list[Tree] = []
        self._tokens = self._timed_tokens = 0
        self._start: float | None = None

    def add(self, metrics: Tree, batch: Batch) -> None:
        self._metrics.append(metrics)
        tokens = int(np.count_nonzero(batch["segment_ids"]))
        self._tokens += tokens
        if self._start is None:
            jax.block_until_ready(metrics)
            self._start = time.perf_counter()
        else:
            self._timed_tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is not training; waits for the steps under way first."""
        jax.block_until_ready(self._metrics)
        before = time.perf_counter()
        yield
        if self._start is not None:
            self._start += time.perf_counter() - before

    def close(self) -> dict[str, float]:
        """Means since the last close, tokens/s and memory; waits for the device."""
        values = means(self._metrics)
        values |= {name: means(self._metrics[-1:])[name] for name in _LAST if name in values}
        values["tokens"] = self._tokens
        now = time.perf_counter()
        if self._start is not None and self._timed_tokens:
            values["tokens_per_s"] = self._timed_tokens / (now - self._start)
        values["memory_gib"] = memory_gib()
        self._metrics, self._tokens, self._timed_tokens, self._start = [], 0, 0, now
        return values


# A rate is logged as it is now, not as a mean.
_LAST = ("learning_rate", "loss_scale")


def means(metrics: list[Tree]) -> dict[str, float]:
    """{name: sum / count} over several steps' {name: (sum, count)}."""
    fetched = jax.device_get(metrics)
    return {
        name: float(sum(m[name][0] for m in fetched))
        / max(float(sum(m[name][1] for m in fetched)), 1e-9)
        for name in fetched[0]
    }


def by_source(metrics: list[Tree], sources: Sequence[str]) -> dict[str, float]:
    """{name/source: sum / count} of the batches of each source but ""; sources: of each batch. What
    a source has none of (the reward of bad answers where all are good) is left out."""
    fetched = jax.device_get(metrics)
    found = {}
    for source in filter(None, dict.fromkeys(sources)):
        own = [m for m, other in zip(fetched, sources, strict=True) if other == source]
        counted = {name for m in own for name, (_, count) in m.items() if count > 0}
        values = means(own)
        found |= {f"{name}/{source}": x for name, x in values.items() if name in counted}
    return found


def memory_gib() -> float:
    """Peak memory of the fullest device; of this process where devices do not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _due(done: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and done % every == 0)


def _finite(values: dict[str, float], done: int, checkpoints: Checkpoints) -> dict[str, float]:
    """A run whose loss is no number has nothing left to learn, nor one whose gradient is none,
    unless it is fp16, which skips such steps."""
    checked = ("loss",) if "loss_scale" in values else ("loss", "grad_norm")
    for name in checked:
        if math.isfinite(values[name]):
            continue
        saved = checkpoints.latest()
        kept = f"checkpoint-{saved} is intact" if saved else "no checkpoint was written yet"
        raise UserError(
            f"the {name} became {values[name]} at step {done}; lower the learning rate, add warmup "
            f"or use --precision bf16 or fp32 ({kept})"
        )
    return values


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first SIGINT set, so that the step under way is finished."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
