"""Rows to a Dataset: tokenized in chunks, on request by several processes, with the same result in
the same order.

Also decides about examples that are too long and rows that cannot be trained on, and counts both.
How rows of one kind become examples is a `Task`; here is that of supervised training, the others
are `preference_encoding.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add
from typing import Any

import numpy as np

from mud_puppy.data.chat import MaskOptions, Plan, plan_row
from mud_puppy.data.example import Dataset, Example
from mud_puppy.data.fields import ROLES
from mud_puppy.data.formats import Row
from mud_puppy.data.processes import in_processes
from mud_puppy.data.report import SKIP_HINT, BadRows, Report
from mud_puppy.data.template import Tokenizer
from mud_puppy.data.tokens import Encoded, check_tokenizer, tokenize
from mud_puppy.errors import UserError, nearest

CHUNK_ROWS = 512
Chunk = tuple[list[Any], Report]


class TooLong(UserError):
    """An example is longer than max_seq_length, and on_long is "stop"."""


@dataclass(frozen=True)
class EncodeOptions(MaskOptions):
    """How rows become examples; UserError for a value out of range.

    max_seq_length: tokens; what an example may have at most.
    on_long: "truncate" cuts the end of an example that has more (of preferences, ratings and steps
    the start of the prompt, never the answer), "skip" leaves it out, "stop" raises.
    on_bad_rows: "stop" raises for a row that cannot be trained on, "skip" leaves it out.
    preprocess_workers: processes; 0 and 1 mean the caller's own.
    """

    max_seq_length: int = 2048
    on_long: str = "truncate"
    on_bad_rows: str = "stop"
    preprocess_workers: int = 1

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise UserError(f"max_seq_length must be at least 2, not {self.max_seq_length}")
        if self.preprocess_workers < 0:
            raise UserError(f"preprocess_workers must be at least 0, not {self.preprocess_workers}")
        if not self.roles_to_train:
            raise UserError("roles_to_train names no role")
        for role in set(self.roles_to_train) - set(ROLES):
            hint = nearest(role, ROLES)
            known = ", ".join(ROLES)
            raise UserError(f"roles_to_train: unknown role {role!r}; known are {known}.{hint}")
        if self.on_long not in ("truncate", "skip", "stop"):
            raise UserError(f"on_long must be truncate, skip or stop, not {self.on_long!r}")
        if self.on_bad_rows not in ("stop", "skip"):
            raise UserError(f"on_bad_rows must be stop or skip, not {self.on_bad_rows!r}")


def plan_alone(row: Row, tokenizer: Tokenizer, options: EncodeOptions) -> list[Plan]:
    """The one text of a row of supervised training."""
    return [plan_row(row, tokenizer, options)]


def make_alone(
    row: Row, plans: list[Plan], encoded: list[Encoded], options: EncodeOptions
) -> Chunk:
    """The one example of a row of supervised training."""
    return _fitted(trained_example(plans[0], encoded[0]), options)


@dataclass(frozen=True)
class Task:
    """How rows of one kind become examples; both functions must be picklable.

    plan(row, tokenizer, options) -> the row's texts, which are tokenized together with others;
    make(row, plans, their tokens, options) -> (examples, report of what fitting them took). Both
    raise UserError for a bad row, `make` TooLong for a long one on which encoding stops.
    """

    plan: Callable[[Any, Tokenizer, EncodeOptions], list[Plan]] = plan_alone
    make: Callable[[Any, list[Plan], list[Encoded], EncodeOptions], Chunk] = make_alone


SUPERVISED = Task()


def encode(
    rows: Sequence[Any], tokenizer: Tokenizer, options: EncodeOptions, task: Task = SUPERVISED
) -> Dataset[Any]:
    """Examples of all rows, in order, and the report of what was cut or left out.

    Raises UserError for a row that cannot be trained on (unless skipped), and when no example is
    left.
    """
    check_tokenizer(tokenizer)
    chunks = [rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]
    workers = min(options.preprocess_workers, len(chunks))
    if workers > 1:
        done = list(in_processes(encode_chunk, chunks, (tokenizer, options, task), workers))
    else:
        done = [encode_chunk(chunk, tokenizer, options, task) for chunk in chunks]
    examples = tuple(chain.from_iterable(made for made, _ in done))
    report = reduce(add, (told for _, told in done), Report())
    if not examples:
        raise UserError(
            f"none of {len(rows)} rows can be trained on: {'; '.join(report.lines()[:3])}"
        )
    return Dataset(examples, report)


def encode_chunk(
    rows: Sequence[Any], tokenizer: Tokenizer, options: EncodeOptions, task: Task
) -> Chunk:
    """The examples of some rows and their report."""
    planned, faults = [], []
    for row in rows:
        try:
            planned.append((row, task.plan(row, tokenizer, options)))
        except UserError as error:
            faults.append(_kept(error, options))
    examples, report = [], Report()
    encoded = iter(tokenize([plan for _, plans in planned for plan in plans], tokenizer))
    for row, plans in planned:
        own = [next(encoded) for _ in plans]
        try:
            made, told = task.make(row, plans, own, options)
        except TooLong:
            raise
        except UserError as error:
            faults.append(_kept(error, options))
            continue
        examples += made
        report += told + Report(unclosed=sum(one.unclosed for one in own))
    return examples, report + Report(bad=BadRows(len(faults), tuple(faults)))


def trained_example(plan: Plan, encoded: Encoded) -> Example:
    """The tokens as an Example; UserError, which shows the text, if none of them is trained."""
    if not encoded.weights.any():
        raise UserError(f"{plan.where}: no token of it would be trained on: {plan.shown}")
    return Example(encoded.tokens, encoded.weights, plan.where)


def too_long(where: str, count: int, limit: int) -> TooLong:
    """The error of on_long="stop"."""
    return TooLong(
        f"{where}: {count} tokens are more than max_seq_length {limit}; "
        "raise it, or set on_long to truncate or skip"
    )


def _kept(error: UserError, options: EncodeOptions) -> str:
    """The message of an error that is skipped over; raises it otherwise."""
    if options.on_bad_rows == "stop":
        raise UserError(f"{error} {SKIP_HINT}") from None
    return str(error)


def _fitted(example: Example, options: EncodeOptions) -> Chunk:
    """The example within max_seq_length, or none, and what that took."""
    limit = options.max_seq_length
    if example.size <= limit:
        return [example], Report()
    if options.on_long == "stop":
        raise too_long(example.where, example.size, limit)
    if options.on_long == "skip":
        return [], Report(too_long=1)
    # Copies, so that the long arrays are freed.
    cut = Example(example.tokens[:limit].copy(), example.weights[:limit].copy(), example.where)
    return ([cut], Report(truncated=1)) if np.any(cut.weights) else ([], Report(cut_away=1))
