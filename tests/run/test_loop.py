"""The loop alone, with a step and checkpoints that only count."""

import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.run.checkpoint import Checkpoints
from mud_puppy.run.loop import Course, Plan, Window, fit
from mud_puppy.run.step import State

BATCH = {"segment_ids": np.ones((1, 2, 5), np.int32)}


class Saved(Checkpoints):
    """Keeps what was asked to be saved: {step: (course, score)}."""

    def __init__(self):
        self.saves = {}

    def save(self, step, state, meta=None, score=None):
        self.saves[step] = (meta, score)

    def wait(self):
        pass

    def latest(self):
        return max(self.saves, default=None)


def run(plan, losses=(), course=Course(), first=0, **metrics):  # noqa: B008 (frozen)
    """(ended, what was saved, rows); evaluation k gives losses[k]."""
    saved, rows, given = Saved(), [], iter(losses)
    values = {"loss": 1.0, "grad_norm": 1.0} | metrics
    ended = fit(
        lambda state, batch: (
            replace(state, step=state.step + 1),
            {k: (v, 1) for k, v in values.items()},
        ),
        State(first, None, None, None),
        ((i, BATCH) for i in range(first, plan.total_steps)),
        (lambda state: {"eval_loss": next(given)}) if losses else None,
        plan,
        saved,
        lambda step, values: rows.append((step, values)),
        course,
    )
    return ended, saved.saves, rows


def test_a_run_that_stopped_early_takes_no_step_when_it_is_resumed():
    plan = Plan(20, eval_steps=1, patience=2)
    ended, saved, _ = run(plan, losses=[3.0, 2.0, 4.0, 5.0, 1.0])
    assert (ended.reason, ended.state.step, ended.course.best_step) == ("early stopping", 4, 2)
    assert saved[4] == (asdict(ended.course), None) and saved[2][1] == 2.0
    again, saved, rows = run(plan, [1.0], ended.course, first=4)
    assert (again.reason, again.state.step, again.course) == ("early stopping", 4, ended.course)
    assert not saved and not rows
    patient = Plan(20, eval_steps=1, patience=3)
    assert run(patient, [1.0] + [9.0] * 9, ended.course, first=4)[0].course.best_step == 5


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_no_number_ends_the_run(name):
    with pytest.raises(UserError, match=f"the {name} became nan at step 1; .*no checkpoint"):
        run(Plan(3), **{name: np.nan})


def test_fp16_goes_on_after_a_gradient_that_overflowed():
    assert run(Plan(3), grad_norm=np.inf, loss_scale=2.0)[0].reason == "done"


def test_only_training_counts_for_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    window = Window()

    def step(seconds):
        now[0] += seconds
        window.add({"loss": (1.0, 1)}, BATCH)

    step(60)  # compiles
    assert "tokens_per_s" not in window.close()
    step(2)
    with window.paused():
        now[0] += 30
    step(2)
    values = window.close()
    assert values["tokens"] == 20 and values["tokens_per_s"] == 5
    window = Window()
    step(60)
    step(2)
    assert window.close()["tokens_per_s"] == 5, "the first step is no part of it"


def test_an_evaluation_that_is_no_number_is_beaten_and_beats_nothing():
    course = Course().after(np.nan, 1).after(2.0, 2)
    assert (course.best_step, course.worse) == (2, 0)
    course = course.after(np.nan, 3).after(2.0, 4)
    assert (course.best_step, course.worse) == (2, 2)
