"""What a row that a reward model is asked about may look like, with or without labels.

A `Scorable` keeps the row as it was read, since it is written again with its scores. Its texts are
those of training (`preferences.py`), so that a text is scored as it was trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from mud_puppy.data.fields import Columns, as_columns, as_text, kind_of, listed
from mud_puppy.data.formats import Row, completed
from mud_puppy.data.preferences import StepsRow, convert_pair, convert_scored, convert_steps
from mud_puppy.errors import UserError

ANSWERS = ("completions", "responses", "answers")
Unused = frozenset[str]


@dataclass(frozen=True)
class Scorable:
    """row: as it was read. form: "pairs" (texts: the chosen and the rejected answer), "answers"
    (several to one prompt), "texts" (one) or "steps" (one). labels: of a text its number, of steps
    whether each is right; None where the row has none."""

    row: Columns
    where: str
    form: str
    texts: tuple[Row | StepsRow, ...]
    labels: tuple[float, ...] | None = None
    source: str = ""


def scorable(task: str, columns: Sequence[str]) -> Callable[[Any, str], tuple[Scorable, Unused]]:
    """The converter (of `read_rows`) of rows for a model of this task, "sequence" or "token".

    columns: names that will be written; a row that has one is refused, as is one of another form.
    """

    def convert(value: object, where: str) -> tuple[Scorable, Unused]:
        row = as_columns(value, where)
        if taken := [name for name in columns if name in row]:
            raise UserError(
                f"{where}: has a column {taken[0]!r} already; give the scores another name (column)"
            )
        build = _steps if task == "token" else _sequence(row)
        found, unused = build(row, where)
        return replace(found, row=cast(Columns, value)), unused

    return convert


def _sequence(row: Columns) -> Callable[[Columns, str], tuple[Scorable, Unused]]:
    if row.keys() >= {"chosen", "rejected"}:
        return _pair
    return _answers if row.keys() & set(ANSWERS) else _text


def _pair(row: Columns, where: str) -> tuple[Scorable, Unused]:
    pair, unused = convert_pair(row, where, whole_texts=True, margins=False)
    texts = pair.chosen, pair.rejected
    return Scorable(row, where, "pairs", texts, source=pair.source), unused


def _answers(row: Columns, where: str) -> tuple[Scorable, Unused]:
    """`prompt` (text or messages) and a list of answers, each text or messages."""
    name = next(name for name in ANSWERS if name in row)
    answers = row[name]
    if "labels" in row:
        raise UserError(
            f"{where}: {name} with labels are the steps of an answer, which a process reward model "
            "scores; this model gives one score of each text (several answers have no labels)"
        )
    if "prompt" not in row:
        raise UserError(f"{where}: {name} need a prompt: its columns are {listed(row)}")
    if not isinstance(answers, list) or not answers:
        what = "an empty list" if answers == [] else kind_of(answers)
        raise UserError(f"{where}: {name} must be a list with at least one answer, not {what}")
    texts = tuple(
        _completed(row, answer, f"{where}: {name}[{i}]") for i, answer in enumerate(answers)
    )
    source = as_text(row.get("source", ""), "source", where)
    unused = frozenset(row.keys() - {"prompt", name, "source", "tools"})
    return Scorable(row, where, "answers", texts, source=source), unused


def _completed(row: Columns, answer: Any, where: str) -> Row:
    """The prompt with one answer; where one is text and the other messages, both as messages."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and isinstance(answer, list):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return completed({**row, "prompt": prompt, "completion": answer}, where)


def _text(row: Columns, where: str) -> tuple[Scorable, Unused]:
    if not row.keys() & {"messages", "completion", "text"}:
        raise UserError(
            f"{where}: a reward model scores chosen and rejected, prompt and completion, prompt "
            f"and completions (a list), messages, or text: its columns are {listed(row)}"
        )
    rated, unused = convert_scored({"label": 0.0} | row, where)
    labels = (rated.label,) if "label" in row else None
    return Scorable(row, where, "texts", (rated.answered,), labels, rated.source), unused


def _steps(row: Columns, where: str) -> tuple[Scorable, Unused]:
    steps = row.get("completions", row.get("steps"))
    if "prompt" not in row or steps is None:
        raise UserError(
            f"{where}: a process reward model scores prompt and steps (or completions), a list of "
            f"texts: its columns are {listed(row)}"
        )
    # Without labels any will do: they are not read.
    count = len(steps) if isinstance(steps, list) else 1
    found, unused = convert_steps({"labels": [True] * count} | row, where)
    labels = tuple(map(float, found.labels)) if "labels" in row else None
    return Scorable(row, where, "steps", (found,), labels, found.source), unused


def one_form(rows: Sequence[Scorable]) -> str:
    """The form of all rows; UserError where they differ, or only some have labels."""
    first = rows[0]
    for row in rows:
        if row.form != first.form:
            raise UserError(
                f"{row.where}: is of the form {row.form}, but {first.where} of the form "
                f"{first.form}; give rows of one form"
            )
        if (row.labels is None) != (first.labels is None):
            lacks, has = (row, first) if row.labels is None else (first, row)
            raise UserError(
                f"{lacks.where}: has no label, but {has.where} has one; give it to all or to none"
            )
    return first.form
