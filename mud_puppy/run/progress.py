"""How far a run is: a bar in a terminal, a plain line now and then where the output is a file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows step, loss, tokens/s, memory and the time left; draws at each `update`.

    total, start: steps of the whole run, and the step that it goes on from. every: in a file, the
    steps between two lines (1 % of the run by default); evaluations are always shown.
    stream: a text file, stderr by default. unit: what a step is.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        stream: Any = None,
        every: int | None = None,
        unit: str = "step",
    ) -> None:
        self._stream = stream or sys.stderr
        self._total, self._unit = total, unit
        self._every = every or max(1, total // 100)
        self._values: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._printed = start - self._every
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """values: as logged; shows loss, eval_loss, tokens_per_s and memory_gib of them."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        self._values |= values
        text = describe(self._values, self._left_s(step, now))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step - self._printed >= self._every or step == self._total or "eval_loss" in values:
            self._printed = step
            where = f"{self._unit} {step}/{self._total}"
            print(f"{where}, {text}" if text else where, file=self._stream, flush=True)

    def note(self, line: str) -> None:
        """Prints a line of its own, above the bar."""
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def _left_s(self, step: int, now: float) -> float | None:
        """From the pace since the first update, which the compilation came before."""
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (self._total - step) * (now - first_time) / (step - first_step)


def describe(values: Mapping[str, Any], left_s: float | None) -> str:
    """The values that a person watches.

    >>> describe({"loss": 2.31449, "tokens_per_s": 10283.0, "memory_gib": 5.93}, 192.0)
    'loss 2.314, 10,283 tok/s, 5.9 GiB, 03:12 left'
    """
    shown = {
        "loss": "loss {:.3f}",
        "eval_loss": "eval {:.3f}",
        "tokens_per_s": "{:,.0f} tok/s",
        "memory_gib": "{:.1f} GiB",
    }
    parts = [form.format(values[name]) for name, form in shown.items() if name in values]
    if left_s is not None:
        parts.append(f"{tqdm.format_interval(left_s)} left")
    return ", ".join(parts)
