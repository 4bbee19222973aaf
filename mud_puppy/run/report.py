"""The report of a run: one HTML file with its curves, samples, config and versions.

It opens in a browser without a network: SVG and CSS are inside, there is no script, and a content
security policy forbids loading anything. All text from outside is escaped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.run.chart import Series, line_chart, short

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart of the report: the metrics in it with their names in the legend."""

    title: str
    names: Mapping[str, str]
    from_zero: bool = True
    noisy: bool = False


CHARTS = (
    Chart("Loss", {"loss": "train", "eval_loss": "evaluation"}, from_zero=False, noisy=True),
    Chart("Learning rate", {"learning_rate": "learning rate"}),
    Chart("Gradient norm", {"grad_norm": "gradient norm"}, noisy=True),
    Chart("Tokens per second", {"tokens_per_s": "tokens/s"}, noisy=True),
    Chart("Memory, GiB", {"memory_gib": "peak memory"}),
)
COLORS = ("one", "two")
_STYLE = Path(__file__).with_name("report.css")


def write_report(
    path: Path, run: Mapping[str, Any], metrics: Sequence[Row], samples: Sequence[Mapping[str, str]]
) -> None:
    """Writes the report of a run to `path`.

    run: what `run_record` returned; "title" and "figures" ({label: text}) may be added and are
    shown first. metrics: rows of metrics.jsonl (`read_metrics`). samples: {"prompt", "before",
    "after"}, generated before and after training. Metrics without a chart here get their own.
    """
    title = str(run.get("title", "Fine-tuning run"))
    sections = [
        f"<h1>{escape(title)}</h1>{_subtitle(run)}",
        _figures(final_figures(metrics) | dict(run.get("figures", {}))),
        f'<div class="charts">{"".join(_charts(metrics))}</div>',
        _sources(metrics),
        _samples(samples),
        _table("Config", run.get("config", {}), is_open=True),
        _table("Versions", run.get("versions", {})),
        _table("Machine", {k: run[k] for k in ("device", "git", "started", "command") if k in run}),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE.read_text(), body="\n".join(sections))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror}") from error


def final_figures(metrics: Sequence[Row]) -> dict[str, str]:
    """{label: text} of what came out: steps, losses, speed, memory; only what was measured.

    >>> final_figures([{"step": 1, "loss": 4.0, "eval_loss": 4.0}, {"step": 2, "eval_loss": 3.0}])
    {'Steps': '2', 'Final loss': '4', 'Evaluation loss': '4 → 3 (-25.0 %)'}
    """

    def values(name: str) -> list[float]:
        return [row[name] for row in metrics if row.get(name) is not None]

    figures = {}
    if metrics:
        figures["Steps"] = f"{max(row['step'] for row in metrics):,}"
    if loss := values("loss"):
        figures["Final loss"] = short(loss[-1])
    if held_out := values("eval_loss"):
        first, last = held_out[0], held_out[-1]
        change = f" ({100 * (last - first) / first:+.1f} %)" if first > 0 else ""
        figures["Evaluation loss"] = f"{short(first)} → {short(last)}{change}"
    if speed := values("tokens_per_s"):
        middle = sorted(speed)[len(speed) // 2]  # the median: the first step holds the compilation
        figures["Tokens per second"] = f"{middle:,.0f}"
    if memory := values("memory_gib"):
        figures["Peak memory"] = f"{max(memory):.1f} GiB"
    return figures


def _charts(metrics: Sequence[Row]) -> list[str]:
    known = {name for chart in CHARTS for name in chart.names} | {"step", "tokens"}
    known |= {f"{name}/{source}" for source, name in _of_sources(metrics)}
    others = dict.fromkeys(name for row in metrics for name in row if name not in known)
    own = [Chart(name.replace("_", " ").capitalize(), {name: name}, False, True) for name in others]
    return [_chart(chart, metrics) for chart in [*CHARTS, *own]]


def _chart(chart: Chart, metrics: Sequence[Row]) -> str:
    lines = [
        Series(legend, [(r["step"], r[name]) for r in metrics if name in r], color, chart.noisy)
        for (name, legend), color in zip(chart.names.items(), COLORS, strict=False)
    ]
    return line_chart(chart.title, lines, chart.from_zero)


def _of_sources(metrics: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The last value of each figure of a source (`loop.by_source`), by (source, figure of all)."""
    last = {name: value for row in metrics for name, value in row.items() if value is not None}
    split = {name: name.rpartition("/") for name in last if name.startswith("eval_")}
    return {(s, whole): last[name] for name, (whole, _, s) in split.items() if whole in last}


def _sources(metrics: Sequence[Row]) -> str:
    """A line for each source, a column for each figure: charts of all of them would be too many."""
    found = _of_sources(metrics)
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, name in found))
    head = "".join(f"<th>{escape(name.removeprefix('eval_'))}</th>" for name in names)
    rows = [f"<tr><th></th>{head}</tr>"]
    for source in dict.fromkeys(source for source, _ in found):
        values = [found.get((source, name)) for name in names]
        cells = "".join(f"<td>{'' if x is None else short(x)}</td>" for x in values)
        rows.append(f"<tr><th>{escape(source)}</th>{cells}</tr>")
    title = "<summary>Last evaluation, by source</summary>"
    return f'<details open>{title}<table class="sources">{"".join(rows)}</table></details>'


def _subtitle(run: Mapping[str, Any]) -> str:
    device = run.get("device") or {}
    parts = [
        f"{device['count']} x {device['kind']}" if "kind" in device else "",
        f"started {run['started']}" if "started" in run else "",
    ]
    return f'<p class="quiet">{escape(" · ".join(part for part in parts if part))}</p>'


def _figures(figures: Mapping[str, str]) -> str:
    cards = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(str(text))}</dd></div>"
        for label, text in figures.items()
    )
    return f'<dl class="figures">{cards}</dl>'


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    if not samples:
        return ""
    cards = "".join(
        f'<article><p class="prompt">{escape(sample["prompt"])}</p>'
        f'<div class="pair"><div><h3>Before</h3><p>{escape(sample["before"])}</p></div>'
        f"<div><h3>After</h3><p>{escape(sample['after'])}</p></div></div></article>"
        for sample in samples
    )
    return f"<h2>Samples</h2>{cards}"


def _table(title: str, values: Mapping[str, Any], is_open: bool = False) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>"
        for name, value in _flat(values).items()
    )
    if not rows:
        return ""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(title)}</summary><table>{rows}</table></details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
