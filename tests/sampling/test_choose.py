"""Choosing tokens: frequencies against softmax; `test_warpers.py` compares with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.sampling.choose import Options, choose, chooser, truncate

LOGITS = np.asarray(jax.random.normal(jax.random.key(0), (64, 50)) * 2, np.float32)


def test_ties_with_the_last_token_kept_are_kept():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    assert np.isfinite(truncate(logits, 2, 1.0)).tolist() == [[True, True, True, False]]
    assert np.isfinite(truncate(logits, 0, 0.6)).tolist() == [[True, True, True, False]]
    assert np.isfinite(truncate(logits, 1, 1e-6)).tolist() == [[True, False, False, False]]


ROW = jnp.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0, -3.0])
DRAWS = 20_000


def chi_square(options: Options, expected: np.ndarray) -> float:
    """Of DRAWS draws from ROW against `expected`; none where that is zero."""
    keys = jax.random.split(jax.random.key(3), DRAWS)
    tokens, _ = choose(jnp.broadcast_to(ROW, (DRAWS, 8)), keys, chooser(options))
    counts = np.bincount(tokens, minlength=8)
    assert (counts[expected == 0] == 0).all()
    want = expected[expected > 0] * DRAWS
    return float((((counts[expected > 0]) - want) ** 2 / want).sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


# The 0.999 quantile of chi-square with 7 degrees of freedom.
LIMIT = 24.3


def test_frequencies_are_the_softmax_at_the_temperature():
    row = np.asarray(ROW)
    assert chi_square(Options(temperature=1.0), softmax(row)) < LIMIT
    assert chi_square(Options(temperature=0.5), softmax(row / 0.5)) < LIMIT
    assert chi_square(Options(temperature=0.5), softmax(row / 0.53)) > LIMIT  # mutation partner


def test_truncated_frequencies_are_renormalised():
    row = np.asarray(ROW)
    three = softmax(np.where(np.arange(8) < 3, row, -np.inf))
    two = softmax(np.where(np.arange(8) < 2, row, -np.inf))
    assert chi_square(Options(temperature=1.0, top_k=3), three) < LIMIT
    assert chi_square(Options(temperature=1.0, top_p=0.6), two) < LIMIT  # 0.52 < 0.6 <= 0.72
    plain = softmax(row) * (np.arange(8) < 3)  # mutation partner: not renormalised
    assert chi_square(Options(temperature=1.0, top_k=3), plain) > LIMIT


def test_greedy_and_a_temperature_near_zero_take_the_largest():
    keys = jax.random.split(jax.random.key(0), 64)
    for temperature in (0.0, 1e-30):
        tokens, logps = choose(jnp.asarray(LOGITS), keys, chooser(Options(temperature=temperature)))
        np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))
        want = np.log([softmax(row.astype(np.float64)).max() for row in LOGITS])
        np.testing.assert_allclose(logps, want, atol=1e-5)


def test_logps_are_the_models_own_whatever_the_temperature():
    keys = jax.random.split(jax.random.key(0), 64)
    how = chooser(Options(temperature=2.0, top_k=3))
    tokens, logps = choose(jnp.asarray(LOGITS), keys, how)
    want = jax.nn.log_softmax(LOGITS)[np.arange(64), tokens]
    np.testing.assert_allclose(logps, want, atol=1e-5)
    assert np.abs(logps - jax.nn.log_softmax(LOGITS / 2)[np.arange(64), tokens]).max() > 0.1


def test_a_rows_draw_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 64)
    how = chooser(Options(temperature=1.0, top_p=0.9))
    together, _ = choose(jnp.asarray(LOGITS), keys, how)
    alone, _ = choose(jnp.asarray(LOGITS[7:8]), keys[7:8], how)
    assert together[7] == alone[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_options_out_of_range(bad, message):
    with pytest.raises(UserError, match=message):
        Options(**bad)
