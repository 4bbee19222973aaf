"""Schedules against transformers' own, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mud_puppy.run.schedule import schedule

TOTAL, WARMUP, PEAK = 40, 6, 3e-4


def theirs(name: str, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    make = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "cosine_with_restarts": transformers.get_cosine_with_hard_restarts_schedule_with_warmup,
        "polynomial": transformers.get_polynomial_decay_schedule_with_warmup,
    }[name]
    rates = make(optimizer, WARMUP, TOTAL, **options)
    found = []
    for _ in range(TOTAL):
        found.append(rates.get_last_lr()[0])
        optimizer.step()
        rates.step()
    return found


CASES = [
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine_with_restarts", {"num_cycles": 3}, {"restarts": 3}),
    ("polynomial", {"power": 2.0}, {"power": 2.0}),
]


@pytest.mark.parametrize(("name", "options", "ours"), CASES)
def test_follows_transformers(name, options, ours):
    rate = jax.jit(jax.vmap(schedule(name, PEAK, TOTAL, WARMUP, **ours)))
    ours = rate(jnp.arange(TOTAL))
    np.testing.assert_allclose(ours, theirs(name, **options), rtol=2e-5, atol=1e-10)


def test_another_warmup_is_another_schedule():
    rate = jax.vmap(schedule("linear", PEAK, TOTAL, WARMUP + 1))(jnp.arange(TOTAL))
    assert np.abs(np.asarray(rate) - theirs("linear")).max() > 1e-6


def test_constant_warms_up_and_stays():
    rate = schedule("constant", 1.0, 10, 2)
    assert [float(rate(s)) for s in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
