"""The longest sequence and the largest batch that fit, found by compiling.

Memory grows nearly in proportion to the tokens of a batch, so a line through what is known points
at the next size to compile. What is answered was compiled itself, and fits.
"""

from collections.abc import Callable

STEPS = 4  # sizes compiled beyond the one that is known
CLOSE = 0.02  # how near the limit, as a fraction of what may grow, ends the search


def largest(
    needed: Callable[[int], int],
    limit: int,
    first: int,
    fixed: int,
    grain: Callable[[int], int],
    most: int,
) -> int:
    """The largest size found whose bytes, `needed(size)`, are at most `limit`; 0 for none.

    first: a size to begin with. fixed: the bytes that do not grow with the size, for a first line.
    grain(size): sizes near there are its multiples. most: no larger size is tried.
    """
    if fixed > limit:
        return 0
    measured = {0: fixed}
    close = CLOSE * (limit - fixed)
    aim = int(limit - close / 2)  # a line that is a little off should not lead too far
    size = first
    for left in range(STEPS, -1, -1):
        measured[size] = needed(size)
        fit = max(s for s, n in measured.items() if n <= limit)
        over = min((s for s, n in measured.items() if n > limit), default=most + 1)
        low, high = fit + grain(fit), _down(over - 1, grain)
        if low > high or not left or (fit and limit - measured[fit] < close):
            break
        size = min(max(_down(_line(measured, aim), grain), low), high)
    return fit


def _line(measured: dict[int, int], aim: int) -> int:
    """The size at which the line through the two sizes nearest to `aim` bytes meets it."""
    a, b = sorted(sorted(measured, key=lambda s: abs(measured[s] - aim))[:2])
    slope = (measured[b] - measured[a]) / (b - a)
    return int((aim - measured[b]) / slope + b) if slope > 0 else 2 * b


def _down(size: int, grain: Callable[[int], int]) -> int:
    return size // grain(size) * grain(size)


def length_grain(length: int) -> int:
    """Rows are multiples of 64 tokens (`data.loader`); of more where they are long."""
    return 1024 if length >= 16384 else 256 if length >= 2048 else 64
