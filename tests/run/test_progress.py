"""Contract of run/progress.py: a bar in a terminal, lines in a file."""

import doctest
import io

from mud_puppy.run import progress
from mud_puppy.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_doctests():
    assert doctest.testmod(progress).failed == 0


def clock(monkeypatch, step_s: float) -> None:
    """time.monotonic() advances by `step_s` at every call."""
    now = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now) * step_s)


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    clock(monkeypatch, 2.0)
    out = io.StringIO()
    bar = Progress(10, stream=out, every=4)
    for step in range(1, 11):
        bar.update(step, {"loss": 4.0 - step / 10, "tokens_per_s": 1000.0})
        if step == 6:
            bar.update(step, {"eval_loss": 3.5})
    bar.note("saved")
    bar.close()
    lines = out.getvalue().splitlines()
    # Updates come 2 s apart; the pace counts from the first, which the compilation came before.
    assert lines[0] == "step 1/10, loss 3.900, 1,000 tok/s"
    assert lines[1] == "step 5/10, loss 3.500, 1,000 tok/s, 00:10 left"
    assert [line.split(",")[0] for line in lines] == [
        "step 1/10",
        "step 5/10",
        "step 6/10",
        "step 10/10",
        "saved",
    ]
    assert "eval 3.500" in lines[2] and lines[3].endswith("00:00 left")


def test_the_first_line_of_a_short_run_comes_at_once():
    out = io.StringIO()
    Progress(20, start=5, stream=out).update(6, {"loss": 1.0})
    assert out.getvalue() == "step 6/20, loss 1.000\n"


def test_steps_that_are_layers_and_have_no_values(monkeypatch):
    clock(monkeypatch, 30.0)
    out = io.StringIO()
    bar = Progress(4, stream=out, unit="layer")
    for layer in (2, 3, 4):  # the first was there already
        bar.update(layer, {})
    assert out.getvalue() == "layer 2/4\nlayer 3/4, 00:30 left\nlayer 4/4, 00:00 left\n"


def test_a_terminal_gets_a_bar_that_starts_where_the_run_does(monkeypatch):
    clock(monkeypatch, 60.0)
    out = Terminal()
    bar = Progress(40, start=10, stream=out)
    bar.update(20, {"loss": 2.5, "memory_gib": 5.93})
    bar.note("evaluating")
    bar._bar.mininterval = 0
    bar.update(30, {"tokens_per_s": 10283.0})
    bar.close()
    text = out.getvalue()
    assert "10/40" in text and "evaluating\n" in text
    assert "30/40, loss 2.500, 10,283 tok/s, 5.9 GiB, 01:00 left" in text
    assert text.rstrip(" ").endswith("\n")
