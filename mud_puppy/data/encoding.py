"""Rows to a Dataset: tokenized in chunks, on request by several processes, with the same result in
the same order.

Also decides about examples that are too long and rows that cannot be trained on, and counts both.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from multiprocessing import get_context
from operator import add

import numpy as np

from mud_puppy.data.chat import MaskOptions, Plan, check_tokenizer, plan_row, tokenize
from mud_puppy.data.example import SKIP_HINT, BadRows, Dataset, Example, Report
from mud_puppy.data.formats import ROLES, Row
from mud_puppy.data.template import Tokenizer
from mud_puppy.errors import UserError, nearest

CHUNK_ROWS = 512
Chunk = tuple[list[Example], Report]


@dataclass(frozen=True)
class EncodeOptions(MaskOptions):
    """How rows become examples; UserError for a value out of range.

    max_seq_length: tokens; what an example may have at most.
    on_long: "truncate" cuts the end of an example that has more, "skip" leaves it out, "stop"
    raises.
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


def encode(rows: Sequence[Row], tokenizer: Tokenizer, options: EncodeOptions) -> Dataset:
    """Examples of all rows, in order, and the report of what was cut or left out.

    Raises UserError for a row that cannot be trained on (unless skipped), and when no example is
    left.
    """
    check_tokenizer(tokenizer)
    chunks = [rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]
    workers = min(options.preprocess_workers, len(chunks))
    if workers > 1:
        done = list(_by_processes(chunks, tokenizer, options, workers))
    else:
        done = [encode_chunk(chunk, tokenizer, options) for chunk in chunks]
    examples = tuple(chain.from_iterable(made for made, _ in done))
    report = reduce(add, (told for _, told in done), Report())
    if not examples:
        raise UserError(
            f"none of {len(rows)} rows can be trained on: {'; '.join(report.lines()[:3])}"
        )
    return Dataset(examples, report)


def encode_chunk(rows: Sequence[Row], tokenizer: Tokenizer, options: EncodeOptions) -> Chunk:
    """The examples of some rows and their report."""
    plans, faults = [], []
    for row in rows:
        try:
            plans.append(plan_row(row, tokenizer, options))
        except UserError as error:
            faults.append(_kept(error, options))
    examples, reports = [], []
    encoded = tokenize(plans, tokenizer) if plans else []
    for plan, (tokens, weights, unclosed) in zip(plans, encoded, strict=True):
        if not weights.any():
            what = f"{plan.where}: no token of it would be trained on: {plan.shown}"
            faults.append(_kept(UserError(what), options))
            continue
        example, report = _fitted(Example(tokens, weights, plan.where), plan, options)
        examples += [] if example is None else [example]
        reports.append(report + Report(unclosed=unclosed))
    bad = BadRows(len(faults), tuple(faults))
    return examples, reduce(add, reports, Report(bad=bad))


def _kept(error: UserError, options: EncodeOptions) -> str:
    """The message of an error that is skipped over; raises it otherwise."""
    if options.on_bad_rows == "stop":
        raise UserError(f"{error} {SKIP_HINT}") from None
    return str(error)


def _fitted(example: Example, plan: Plan, options: EncodeOptions) -> tuple[Example | None, Report]:
    """The example within max_seq_length, or None, and what that took."""
    limit, count = options.max_seq_length, len(example.tokens)
    if count <= limit:
        return example, Report()
    if options.on_long == "stop":
        raise UserError(
            f"{plan.where}: {count} tokens are more than max_seq_length {limit}; "
            "raise it, or set on_long to truncate or skip"
        )
    if options.on_long == "skip":
        return None, Report(too_long=1)
    # Copies, so that the long arrays are freed.
    cut = Example(example.tokens[:limit].copy(), example.weights[:limit].copy(), example.where)
    return (cut, Report(truncated=1)) if np.any(cut.weights) else (None, Report(cut_away=1))


def _by_processes(
    chunks: list[Sequence[Row]], tokenizer: Tokenizer, options: EncodeOptions, workers: int
) -> Iterator[Chunk]:
    # Spawned, not forked: JAX in the parent has threads and perhaps a device, neither of which
    # survives a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer, options))
    try:
        yield from pool.map(_work, chunks)
    except BrokenProcessPool as error:
        raise UserError(
            "a preprocessing process ended early: put your script's calls under "
            "`if __name__ == '__main__':`, or set preprocess_workers to 1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict = {}


def _start_worker(tokenizer: Tokenizer, options: EncodeOptions) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # one thread each: the processes are the parallelism
    )
    _worker.update(tokenizer=tokenizer, options=options)


def _work(rows: Sequence[Row]) -> Chunk:
    return encode_chunk(rows, **_worker)
