"""Line charts as inline SVG: no script, no fonts, no network. The page's CSS gives the colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

Real = int | float
Point = tuple[Real, Real | None]

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30
MOST_POINTS = 400  # more cannot be told apart at this width
MOST_MARKS = 120  # points with a tooltip


@dataclass(frozen=True)
class Series:
    """One line: its name, (step, value) points with None for no number, and a CSS colour class.

    noisy: many points are drawn faintly, with their moving average over them.
    """

    name: str
    points: Sequence[Point]
    color: str = "one"
    noisy: bool = False


def line_chart(title: str, lines: Sequence[Series], from_zero: bool = False) -> str:
    """A <figure> with the lines over their steps; "" if there is not one number to draw."""
    lines = [line for line in lines if _numbers(line.points)]
    if not lines:
        return ""
    numbers = [point for line in lines for point in _numbers(line.points)]
    x_of, x_ticks = _axis([x for x, _ in numbers], LEFT, WIDTH - RIGHT, tight=True)
    values = [y for _, y in numbers] + ([0.0] if from_zero else [])
    y_of, y_ticks = _axis(values, HEIGHT - BOTTOM, TOP)
    body = [_grid(x_of, x_ticks, y_of, y_ticks)]
    body += [_draw(line, x_of, y_of) for line in lines]
    names = "".join(f'<span class="{s.color}">{escape(s.name)}</span>' for s in lines)
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{names}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg></figure>"
    )


def short(value: Real) -> str:
    """A number as an axis shows it.

    >>> [short(x) for x in (0, 0.25, 2.0, 1500, 53574, 2e-4, 1.5e-5, 3_200_000)]
    ['0', '0.25', '2', '1,500', '53.6k', '2e-4', '1.5e-5', '3.2M']
    """
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _numbers(points: Sequence[Point]) -> list[tuple[Real, Real]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _axis(
    values: Sequence[Real], start: Real, end: Real, tight: bool = False
) -> tuple[Callable[[Real], Real], list[Real]]:
    """(value -> pixel, ticks at 1, 2 or 5 times a power of ten); tight: no room past the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (
            (low - 1, high + 1) if tight or low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
        )
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    if tight:
        step = max(step, 1)
    else:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return lambda v: start + (v - low) / (high - low) * (end - start), ticks


def _grid(
    x_of: Callable[[Real], Real],
    x_ticks: Sequence[Real],
    y_of: Callable[[Real], Real],
    y_ticks: Sequence[Real],
) -> str:
    parts = [f'<text x="{LEFT - 8}" y="{HEIGHT - BOTTOM + 18}" text-anchor="end">step</text>']
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x, y = x_of(tick), HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{short(tick)}</text>')
    return "".join(parts)


def _draw(line: Series, x_of: Callable[[Real], Real], y_of: Callable[[Real], Real]) -> str:
    points = _thin(line.points, MOST_POINTS)
    many = line.noisy and len(_numbers(line.points)) > 40
    parts = [_path(points, x_of, y_of, f"{line.color} faint" if many else line.color)]
    if many:
        parts.append(_path(_thin(_smooth(line.points), MOST_POINTS), x_of, y_of, line.color))
    for x, y in _numbers(_thin(line.points, MOST_MARKS)):
        tip = f"{escape(line.name)} {short(y)} at step {x:g}"
        style = line.color if len(_numbers(points)) < 15 else f"{line.color} hidden"
        parts.append(
            f'<circle class="{style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5">'
            f"<title>{tip}</title></circle>"
        )
    return "".join(parts)


def _path(
    points: Sequence[Point],
    x_of: Callable[[Real], Real],
    y_of: Callable[[Real], Real],
    style: str,
) -> str:
    """A path that is broken where there is no number."""
    parts, pen = [], "M"
    for x, y in points:
        if y is None or not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x_of(x):.1f} {y_of(y):.1f}")
        pen = "L"
    return f'<path class="{style}" d="{"".join(parts)}"/>'


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Mean over a twentieth of the numbers, centred so that it does not lag behind."""
    numbers = _numbers(points)
    reach = max(1, len(numbers) // 40)
    sums = [0.0, *accumulate(y for _, y in numbers)]
    ends = [(max(0, i - reach), min(len(numbers), i + reach + 1)) for i in range(len(numbers))]
    means = [(sums[high] - sums[low]) / (high - low) for low, high in ends]
    return [(x, mean) for (x, _), mean in zip(numbers, means, strict=True)]


def _thin(points: Sequence[Point], most: int) -> list[Point]:
    """Every n-th point, and the last."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / most)
    last = [] if (len(points) - 1) % stride == 0 else [points[-1]]
    return [*points[::stride], *last]
