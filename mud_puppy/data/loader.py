"""Batches as a pure function of (seed, step).

Nothing is kept between batches, so a resumed run needs only its step number. Bins are packed once
for a Loader (ties between equal lengths are broken by the seed); each epoch is another order of the
same bins. The last batch of an epoch is filled with empty rows of weight 0, so that every batch has
one shape.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int64

from mud_puppy.data.example import Example
from mud_puppy.data.packing import efficiency, pack

LENGTH_MULTIPLE = 64
Batch = dict[str, np.ndarray]


def collate_sft(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Rows of examples to arrays [B, length]: tokens, positions, segment_ids, targets (int32) and
    weights (float32).

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


@dataclass(frozen=True, eq=False)
class Loader:
    """Examples in batches of `accumulation` x `batch_size` rows.

    max_seq_length bounds an example's tokens. `pack` puts several examples in a row. `collate`
    makes the arrays of one micro-batch from its rows and their length.
    """

    examples: Sequence[Example]
    batch_size: int
    accumulation: int = 1
    max_seq_length: int = 2048
    pack: bool = True
    seed: int = 0
    shuffle: bool = True
    collate: Callable[[Sequence[Sequence[Example]], int], Batch] = collate_sft

    @cached_property
    def length(self) -> int:
        """T, the tokens of a row."""
        return row_length(self.examples, self.max_seq_length, self.pack)

    @cached_property
    def rows(self) -> list[list[int]]:
        """Which examples each row holds."""
        count = len(self.examples)
        if not self.pack:
            return [[i] for i in range(count)]
        order = _order(self.seed, -1, count) if self.shuffle else np.arange(count)
        bins = pack(_lengths(self.examples)[order], self.length)
        return [order[row].tolist() for row in bins]

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every example once."""
        return -(-len(self.rows) // (self.accumulation * self.batch_size))

    def batch_at(self, step: int) -> Batch:
        """The arrays [A, B, T] of step `step`, counted from 0 through all epochs."""
        epoch, k = divmod(step, self.steps_per_epoch)
        count = len(self.rows)
        order = _order(self.seed, epoch, count) if self.shuffle else np.arange(count)
        need = self.accumulation * self.batch_size
        chosen = order[k * need : (k + 1) * need].tolist()
        rows = [[self.examples[i] for i in self.rows[r]] for r in chosen]
        rows += [[] for _ in range(need - len(rows))]
        flat = self.collate(rows, self.length)
        lead = (self.accumulation, self.batch_size)
        return {name: array.reshape(lead + array.shape[1:]) for name, array in flat.items()}

    def describe(self) -> dict[str, int | float]:
        """Counts of an epoch: examples, tokens, trained_tokens, rows, row_length, steps_per_epoch;
        and the packing efficiency, the share of the rows' tokens that are not padding."""
        lengths = _lengths(self.examples)
        return {
            "examples": len(self.examples),
            "tokens": int(lengths.sum()),
            "trained_tokens": sum(example.trained for example in self.examples),
            "rows": len(self.rows),
            "row_length": self.length,
            "packing_efficiency": efficiency(lengths, self.rows, self.length),
            "steps_per_epoch": self.steps_per_epoch,
        }


def row_length(examples: Sequence[Example], max_seq_length: int, pack: bool) -> int:
    """T, a multiple of 64: of the longest example, or when packing of max_seq_length or, if less,
    of all together."""
    lengths = _lengths(examples)
    if lengths.max() > max_seq_length:
        long = examples[int(lengths.argmax())]
        raise ValueError(
            f"{long.where} has {lengths.max()} tokens, above max_seq_length {max_seq_length}"
        )
    need = min(max_seq_length, int(lengths.sum())) if pack else int(lengths.max())
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
    _ = loader.rows, loader.length  # computed once here, not by several threads
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


def _lengths(examples: Sequence[Example]) -> Int64[np.ndarray, " n"]:
    return np.array([len(example.tokens) for example in examples], np.int64)
