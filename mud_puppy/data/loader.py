"""Batches as a pure function of (seed, step).

Nothing is kept between batches, so a resumed run needs only its step number. Bins are packed once
for a Loader (ties between equal lengths are broken by the seed); each epoch is another order of the
same bins. The last batch of an epoch is filled with empty rows of weight 0, so that every batch has
one shape.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Generic

import numpy as np
from jaxtyping import Int64

from mud_puppy.data.example import AnyExample, Example, Kind, TaughtExample
from mud_puppy.data.packing import efficiency, pack

LENGTH_MULTIPLE = 64
Batch = dict[str, np.ndarray]


def collate_sft(rows: Sequence[Sequence[Example]], length: int, most: int = 0) -> Batch:
    """Rows of examples to arrays [B, length]: tokens, positions, segment_ids, targets (int32) and
    weights (float32). `most`, the most examples that a row may have, is not needed here.

    Positions restart with each example; segment_ids count the row's examples from 1 and are 0 on
    padding. `targets[t]` is `tokens[t + 1]` and `weights[t]` its weight inside one example; both
    are 0 at an example's last token and on padding, which is told by its segment alone, so that a
    pad token equal to EOS hides no EOS.
    """
    shape = (len(rows), length)
    batch: Batch = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "positions", "segment_ids", "targets")
    }
    batch["weights"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, example in enumerate(row, start=1):
            n = len(example.tokens)
            batch["tokens"][b, at : at + n] = example.tokens
            batch["positions"][b, at : at + n] = np.arange(n)
            batch["segment_ids"][b, at : at + n] = segment
            batch["targets"][b, at : at + n - 1] = example.tokens[1:]
            batch["weights"][b, at : at + n - 1] = example.weights[1:]
            at += n
    return batch


def collate_taught(
    rows: Sequence[Sequence[TaughtExample]], length: int, most: int = 0, *, k: int
) -> Batch:
    """`collate_sft`, and of each token teacher_ids (int32, -1: none) and teacher_logps (float32)
    [B, length, k]."""
    batch = collate_sft([[taught.example for taught in row] for row in rows], length)
    shape = (len(rows), length, k)
    batch["teacher_ids"] = np.full(shape, -1, np.int32)
    batch["teacher_logps"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        at = 0
        for taught in row:
            end = at + taught.size
            # Nothing follows the last token, whatever its row says.
            batch["teacher_ids"][b, at : end - 1] = taught.ids[:-1]
            batch["teacher_logps"][b, at : end - 1] = taught.logps[:-1]
            at = end
    return batch


@dataclass(frozen=True, eq=False)
class Loader(Generic[Kind]):
    """Examples in batches of `accumulation` x `batch_size` rows.

    max_seq_length bounds the tokens of a sequence (a pair has two, in one row). `pack` puts several
    examples in a row. `collate(rows, length, most)` makes the arrays [A * B, ...] of a step from
    all its rows, their length, and the most examples that any row of the loader holds. `computed`:
    arrays [rows, ...] of what was computed of every row; a batch has those of its own. `bins`:
    which examples each row holds, where the caller knows; else rows are packed here.
    """

    examples: Sequence[Kind]
    batch_size: int
    accumulation: int = 1
    max_seq_length: int = 2048
    pack: bool = True
    seed: int = 0
    shuffle: bool = True
    collate: Callable[[Sequence[Sequence[Any]], int, int], Batch] = collate_sft
    computed: Mapping[str, np.ndarray] = field(default_factory=dict)
    bins: list[list[int]] | None = None

    @cached_property
    def length(self) -> int:
        """T, the tokens of a row."""
        return row_length(self.examples, self.max_seq_length, self.pack)

    @cached_property
    def rows(self) -> list[list[int]]:
        """Which examples each row holds."""
        if self.bins is not None:
            return self.bins
        count = len(self.examples)
        if not self.pack:
            return [[i] for i in range(count)]
        order = _order(self.seed, -1, count) if self.shuffle else np.arange(count)
        bins = pack(_sizes(self.examples)[order], self.length)
        return [order[row].tolist() for row in bins]

    @cached_property
    def most(self) -> int:
        """The most examples that a row holds."""
        return max(len(row) for row in self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every example once."""
        return -(-len(self.rows) // (self.accumulation * self.batch_size))

    def batch_at(self, step: int) -> Batch:
        """The arrays [A, B, T] of step `step`, counted from 0 through all epochs."""
        return self.batch_of(self.rows_at(step))

    def rows_at(self, step: int) -> list[int]:
        """Which of `rows` step `step` has."""
        epoch, k = divmod(step, self.steps_per_epoch)
        count = len(self.rows)
        order = _order(self.seed, epoch, count) if self.shuffle else np.arange(count)
        need = self.accumulation * self.batch_size
        return order[k * need : (k + 1) * need].tolist()

    def batch_of(self, chosen: Sequence[int]) -> Batch:
        """The arrays [A, B, ...] of these of `rows`, filled up with empty ones."""
        need = self.accumulation * self.batch_size
        rows = [[self.examples[i] for i in self.rows[r]] for r in chosen]
        rows += [[] for _ in range(need - len(rows))]
        flat = self.collate(rows, self.length, self.most)
        for name, array in self.computed.items():
            flat[name] = np.zeros((need, *array.shape[1:]), array.dtype)
            flat[name][: len(chosen)] = array[list(chosen)]
        lead = (self.accumulation, self.batch_size)
        return {name: array.reshape(lead + array.shape[1:]) for name, array in flat.items()}

    def describe(self) -> dict[str, int | float]:
        """Counts of an epoch: examples, tokens, trained_tokens, rows, row_length, steps_per_epoch;
        and the packing efficiency, the share of the rows' tokens that are not padding."""
        sizes = _sizes(self.examples)
        return {
            "examples": len(self.examples),
            "tokens": int(sizes.sum()),
            "trained_tokens": sum(example.trained for example in self.examples),
            "rows": len(self.rows),
            "row_length": self.length,
            "packing_efficiency": efficiency(sizes, self.rows, self.length),
            "steps_per_epoch": self.steps_per_epoch,
        }


def row_length(examples: Sequence[AnyExample], max_seq_length: int, pack: bool) -> int:
    """T, a multiple of 64: of the largest example, or when packing of max_seq_length (if no example
    takes more: a pair may) or, if less, of all together."""
    for example in examples:
        for one in example.sequences:
            if one.size > max_seq_length:
                raise ValueError(
                    f"{one.where} has {one.size} tokens, above max_seq_length {max_seq_length}"
                )
    sizes = _sizes(examples)
    largest = int(sizes.max())
    need = min(max(max_seq_length, largest), int(sizes.sum())) if pack else largest
    return padded_length(need)


def padded_length(tokens: int) -> int:
    """The row length that holds so many tokens."""
    return -(-tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def batch_size_for(tokens_per_batch: int, length: int) -> int:
    """Rows of `length` tokens in a batch of about `tokens_per_batch`, at least one."""
    return max(1, tokens_per_batch // length)


def prefetch(loader: Loader, start: int, stop: int, workers: int) -> Iterator[Batch]:
    """`batch_at(start)` .. `batch_at(stop - 1)` in order, made ahead by `workers` threads (0:
    none).

    An exception in a thread is raised where its batch would have come; closing the iterator ends
    the threads.
    """
    if workers == 0:
        yield from map(loader.batch_at, range(start, stop))
        return
    _ = loader.most, loader.length  # computed once here, not by several threads
    pool = ThreadPoolExecutor(workers, thread_name_prefix="mud-puppy-data")
    try:
        steps = iter(range(start, stop))
        ahead: deque[Future[Batch]] = deque()
        for step in steps:
            ahead.append(pool.submit(loader.batch_at, step))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " n"]:
    """The permutation of an epoch; epoch -1 is the order in which examples are packed."""
    order = np.random.default_rng((seed, epoch + 1)).permutation(count)
    order.setflags(write=False)
    return order


def _sizes(examples: Sequence[AnyExample]) -> Int64[np.ndarray, " n"]:
    return np.array([example.size for example in examples], np.int64)
