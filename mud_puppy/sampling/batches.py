"""Prompts to padded batches in a few fixed shapes, so that few programs are compiled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """tokens int32 [B, T] padded on the right, lengths int32 [B], rows int32 [B].

    rows: the number of each prompt in the list that was batched, -1 for rows that only fill up.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray


def batches(
    prompts: Sequence[Sequence[int]], batch_size: int, multiple: int = 1
) -> Iterator[Batch]:
    """Prompts by length, at most `batch_size` at a time, rounded up to a `multiple` of rows."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        B = min(bucket(len(numbers), smallest=1), batch_size)
        yield _pad(prompts, numbers, -(-B // multiple) * multiple)


def _pad(prompts: Sequence[Sequence[int]], numbers: list[int], B: int) -> Batch:
    T = bucket(max(len(prompts[i]) for i in numbers))
    batch = Batch(np.zeros((B, T), np.int32), np.ones(B, np.int32), np.full(B, -1, np.int32))
    for b, i in enumerate(numbers):
        batch.tokens[b, : len(prompts[i])] = prompts[i]
        batch.lengths[b], batch.rows[b] = len(prompts[i]), i
    return batch


def bucket(n: int, smallest: int = 16) -> int:
    """The least of smallest * (1, 2, 3, 4, 6, 8, 12, 16 ...) that holds n."""
    size = smallest
    while size < n:
        size *= 2
    between = size * 3 // 4
    return between if n <= between and between % smallest == 0 else size
