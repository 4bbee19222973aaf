"""Best-fit-decreasing bin packing of example lengths.

Johnson et al. 1974 ("Worst-case performance bounds for simple one-dimensional packing algorithms"):
the longest item first, each into the fullest bin that still holds it. Items of one length and bins
with one remaining space are moved together, which makes the same choices in O(n + lengths *
spaces).
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each index once, no bin's lengths above `capacity`; in order
    of opening.

    Raises ValueError for a length below 1 or above the capacity.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"lengths {sizes.min()}..{sizes.max()} do not lie in 1..{capacity}")
    order = np.argsort(-sizes, kind="stable").tolist()
    values, counts = np.unique(sizes, return_counts=True)
    bins: list[list[int]] = []
    spaces: dict[int, list[int]] = {}  # remaining space -> the bins that have it
    at = 0
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        group = order[at : at + count]
        at += count
        placed = 0
        for space in sorted(key for key in spaces if key >= size):
            placed = _fill(group, placed, size, space, spaces, bins)
            if placed == count:
                break
        while placed < count:
            # A new bin takes as many as fit, as best fit would: it is the fullest that still holds
            # one.
            taken = group[placed : placed + capacity // size]
            placed += len(taken)
            spaces.setdefault(capacity - size * len(taken), []).append(len(bins))
            bins.append(taken)
    return bins


def efficiency(
    lengths: Sequence[int] | np.ndarray, bins: Sequence[Sequence[int]], capacity: int
) -> float:
    """The share of the bins' tokens that are examples' tokens."""
    return float(np.sum(lengths)) / (len(bins) * capacity) if len(bins) else 0.0


def _fill(
    group: list[int],
    placed: int,
    size: int,
    space: int,
    spaces: dict[int, list[int]],
    bins: list[list[int]],
) -> int:
    """Puts items of `group` from `placed` on into the bins with `space`; returns how many are
    placed then."""
    waiting = spaces.pop(space)
    each = space // size
    used = 0
    for index in waiting:
        if placed == len(group):
            break
        taken = group[placed : placed + each]
        placed += len(taken)
        used += 1
        bins[index].extend(taken)
        spaces.setdefault(space - size * len(taken), []).append(index)
    if used < len(waiting):
        spaces.setdefault(space, []).extend(waiting[used:])
    return placed
