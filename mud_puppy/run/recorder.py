"""Everything a person sees of a run: progress, metrics, samples before and after, the report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.run.metrics import open_metrics, read_metrics
from mud_puppy.run.progress import Progress
from mud_puppy.run.record import run_record
from mud_puppy.run.report import write_report

Answers = Sequence[tuple[Any, str]]


class Recorder:
    """Hears of every logged line of a run in `output`; the report is written when it ends.

    first: the step that the run starts or goes on from. `latest` holds the newest value of each
    metric.
    """

    def __init__(self, config: Config, output: Path, first: int, total: int) -> None:
        self.latest: dict[str, float] = {}
        self._output = output
        resumed = first if config.resume and first > 0 else None
        self._samples = {} if resumed is None else _read_samples(output / "samples.json")
        self._run = run_record(output, config.to_dict())
        self._metrics = open_metrics(output, config.log_with, resumed, config.to_dict())
        self._progress = Progress(total, first)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.latest |= values
        self._metrics.write(step, values)
        self._progress.update(step, values)

    def samples(self, when: str, answers: Answers) -> None:
        """`when`: "before" or "after"; answers: (prompt, reply) pairs."""
        if not answers:
            return
        pairs = [{"prompt": _text(prompt), "reply": reply} for prompt, reply in answers]
        self._samples[when] = pairs
        path = self._output / "samples.json"
        fresh = path.with_suffix(".tmp")  # a kill leaves the old file or the new one
        try:
            fresh.write_text(json.dumps(self._samples, indent=1) + "\n")
            os.replace(fresh, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        for pair in pairs:
            self._progress.note(f"{when}: {pair['prompt']!r} -> {pair['reply']!r}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.close()
        self._metrics.close()
        rows = read_metrics(self._output / "metrics.jsonl")
        try:
            write_report(self._output / "report.html", self._run, rows, self._both())
        except UserError:
            if error is None:  # else what ended the run is what must be said
                raise

    def _both(self) -> list[dict[str, str]]:
        """Samples side by side: {"prompt", "before", "after"}; what is not there is empty."""
        before, after = (self._samples.get(when, []) for when in ("before", "after"))
        prompts = [pair["prompt"] for pair in before or after]
        replies = [{p["prompt"]: p["reply"] for p in pairs} for pairs in (before, after)]
        return [
            {"prompt": p, "before": replies[0].get(p, ""), "after": replies[1].get(p, "")}
            for p in prompts
        ]


def _read_samples(path: Path) -> dict[str, list[dict[str, str]]]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); remove the file") from None


def _text(prompt: Any) -> str:
    """A prompt as one text: a list of messages loses its roles when there is only one."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
