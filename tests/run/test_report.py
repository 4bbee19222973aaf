"""Contract of run/report.py and run/chart.py: one file, no network, nothing from outside runs."""

import doctest
import re
from html.parser import HTMLParser

import pytest

from mud_puppy.errors import UserError
from mud_puppy.run import chart, report
from mud_puppy.run.chart import Series, line_chart
from mud_puppy.run.report import write_report

EVIL = "<script>alert(1)</script>\"'><img src=http://evil.example/x.png onerror=alert(2)>&amp;"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def rows(count: int) -> list[dict]:
    train = [
        {
            "step": i,
            "loss": 4.0 - i / count,
            "learning_rate": 1e-4,
            "grad_norm": None if i == 2 else 1.0,
            "tokens_per_s": 1000.0 + i,
            "memory_gib": 2.5,
            "loss_scale": 2.0**i if i < 30 else 2.0,
        }
        for i in range(1, count + 1)
    ]
    return [*train, {"step": 1, "eval_loss": 4.0}, {"step": count, "eval_loss": 3.0}]


def render(tmp_path, run=None, metrics=(), samples=()) -> tuple[Page, str]:
    path = tmp_path / "sub" / "report.html"
    write_report(path, run or {}, list(metrics), list(samples))
    text = path.read_text(encoding="utf-8")
    return Page(text), text


@pytest.mark.parametrize("module", [chart, report])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_shows_curves_figures_samples_config_and_versions(tmp_path):
    run = {
        "title": "SmolLM2, LoRA",
        "config": {"lora": {"rank": 16}, "adapter": None, "targets": ["q", "v"]},
        "versions": {"jax": "0.10.2", "flax": None},
        "device": {"kind": "cpu", "count": 8},
        "figures": {"Median reply": "71 → 18"},
    }
    sample = {"prompt": "Hi?", "before": "I am a model", "after": "Hello!"}
    page, _ = render(tmp_path, run, rows(20), [sample])
    for expected in [
        *("SmolLM2, LoRA", "8 x cpu", "Median reply", "71 → 18", "Hi?", "I am a model", "Hello!"),
        *("lora.rank", "16", '["q", "v"]', "jax", "0.10.2", "Versions"),
        *("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory, GiB"),
        *("train", "evaluation", "4 → 3 (-25.0 %)", "2.5 GiB", "Loss scale"),
        "train 3.95 at step 1",  # a tooltip
    ]:
        assert expected in page.text, expected
    assert page.tags.count("svg") == 6


def test_sources_stand_in_a_table_and_have_no_charts(tmp_path):
    figures = {"eval_loss": 2.0, "eval_rewards/chosen": 0.5}
    by_source = {"eval_loss/s0": 1.25, "eval_loss/<b>": 3.5, "eval_rewards/chosen/s0": 0.75}
    metrics = [
        {"step": 1, "eval_loss": 9.0, "eval_loss/s0": 9.0},
        {"step": 2} | figures | by_source,
    ]
    page, text = render(tmp_path, {}, metrics)
    assert "Last evaluation, by source" in page.text
    assert re.findall("<td>(.*?)</td>", text) == ["1.25", "0.75", "3.5", ""]
    assert "&lt;b&gt;" in text and "s0" in page.text
    assert page.tags.count("svg") == 2
    page, _ = render(tmp_path, {}, [{"step": 1} | figures])
    assert "by source" not in page.text and page.tags.count("svg") == 2


def test_loads_nothing_and_runs_nothing(tmp_path):
    page, text = render(tmp_path, {"title": "t"}, rows(20))
    assert "http" not in text.replace("http-equiv", "")
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "style"} & names
    assert not any(name.startswith("on") for name in names)
    assert "@import" not in text and "url(" not in text
    policy = dict(page.attributes)["content"]
    assert policy is not None and policy.startswith("default-src 'none';")
    assert "prefers-color-scheme: dark" in text


def test_all_text_from_outside_is_escaped(tmp_path):
    run = {
        "title": EVIL,
        "figures": {EVIL: EVIL},
        "config": {EVIL: EVIL, "nested": {EVIL: [EVIL]}},
        "versions": {EVIL: EVIL},
        "device": {"kind": EVIL, "count": 1},
        "started": EVIL,
        "command": [EVIL],
    }
    sample = {"prompt": EVIL, "before": EVIL, "after": EVIL}
    page, text = render(tmp_path, run, [{"step": 1, EVIL: 1.0}], [sample])
    assert not {"script", "img"} & set(page.tags)
    assert not {"src", "onerror"} & {name for name, _ in page.attributes}
    assert "<script" not in text and page.text.count(EVIL) >= 12


def test_the_parser_would_see_an_unescaped_script():
    assert "script" in Page(f"<p>{EVIL}</p>").tags


@pytest.mark.parametrize("metrics", [[], [{"step": 1}], [{"step": 1, "loss": None}], rows(1)])
def test_a_run_without_numbers_still_has_a_report(tmp_path, metrics):
    page, _ = render(tmp_path, {}, metrics)
    assert "Fine-tuning run" in page.text


def test_a_long_run_stays_a_small_file(tmp_path):
    _, text = render(tmp_path, {}, rows(100_000))
    assert len(text) < 400_000


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "sub").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        render(tmp_path)


def paths(svg: str) -> list[str]:
    return re.findall(r'<path class="[^"]*" d="([^"]*)"', svg)


def test_chart_puts_points_where_they_belong():
    svg = line_chart("t", [Series("s", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    left, right, top, bottom = chart.LEFT, chart.WIDTH - chart.RIGHT, chart.TOP, chart.HEIGHT - 30
    middle = f"{(left + right) / 2:.1f} {(top + bottom) / 2:.1f}"
    assert paths(svg) == [f"M{left:.1f} {bottom:.1f}L{middle}L{right:.1f} {top:.1f}"]


def test_chart_breaks_a_line_where_there_is_no_number():
    nan = float("nan")
    svg = line_chart("t", [Series("s", [(1, 1.0), (2, 2.0), (3, None), (4, nan), (5, 1.0)])])
    assert re.sub(r"[^ML]", "", paths(svg)[0]) == "MLM"
    assert line_chart("t", [Series("s", [(1, None)])]) == ""


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-8, 5e9])
def test_chart_of_one_value_has_room_around_it(value):
    svg = line_chart("t", [Series("s", [(1, value), (2, value)])])
    (y,) = {float(y) for y in re.findall(r'cy="([^"]*)"', svg)}
    assert chart.TOP < y < chart.HEIGHT - chart.BOTTOM
    assert "nan" not in svg


def test_a_noisy_line_has_its_average_over_it_and_the_average_does_not_lag():
    straight = [(i, float(i)) for i in range(200)]
    faint, mean = paths(line_chart("t", [Series("s", straight, noisy=True)]))
    middle = slice(50, 150)  # at the ends the window is one-sided
    assert faint.split("L")[middle] == mean.split("L")[middle]
    assert len(paths(line_chart("t", [Series("s", straight)]))) == 1
