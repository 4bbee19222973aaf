"""The longest sequence and the largest batch that fit, found by compiling.

Memory grows nearly in proportion to the tokens of a batch, so a line through what is known points
at the next size to compile. What is answered was compiled itself, and fits.
"""

from collections.abc import Callable, Mapping

STEPS = 5  # sizes compiled beyond those that are known
CLOSE = 0.04  # how near the limit, as a fraction of what may grow, ends the search
CLOSE_SIZE = 0.06  # or how much larger, as a fraction of what fits, a size may fit at best


def largest(
    needed: Callable[[int], int],
    limit: int,
    known: Mapping[int, int],
    grain: Callable[[int], int],
    most: int,
    first: int | None = None,
) -> int:
    """The largest size found whose bytes, `needed(size)`, are at most `limit`; 0 for none.

    known: bytes of sizes that need not be compiled; of 0 those that do not grow, and of another one
    unless `first` is given. grain(size): sizes
    near there are its multiples. most: no larger size is tried. first: where to begin, if not where
    the line through what is known points.
    """
    measured = dict(known)
    if measured[0] > limit:
        return 0
    for step in range(STEPS):
        size = first if first and not step else _next(measured, limit, grain, most)
        if size is None:
            break
        measured[size] = needed(size)
    return max(s for s, n in measured.items() if n <= limit)


def _next(
    measured: dict[int, int], limit: int, grain: Callable[[int], int], most: int
) -> int | None:
    """The size to compile next, None when the largest is known well enough."""
    close = CLOSE * (limit - measured[0])
    fit = max(s for s, n in measured.items() if n <= limit)
    over = min((s for s, n in measured.items() if n > limit), default=most + 1)
    low, high = fit + grain(fit), _down(over - 1, grain)
    near = (over <= most and over - fit < CLOSE_SIZE * fit) or limit - measured[fit] < close
    if low > high or (fit and near):
        return None
    # Two sizes beside 0 say well what the next one takes.
    most_likely = _down(_line(measured, limit), grain)
    if len(measured) > 2 and most_likely < max(fit + 1, fit * (1 + CLOSE_SIZE)):
        return None
    # A line that is a little off should not lead too far.
    size = _down(_line(measured, int(limit - close / 2)), grain)
    return min(max(size, low), high)


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
