"""Which tokens temperature, top-k and top-p keep, against transformers' logits warpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mud_puppy.sampling.choose import truncate

LOGITS = np.asarray(jax.random.normal(jax.random.key(0), (64, 50)) * 2, np.float32)


def warped(warpers) -> np.ndarray:
    """Which tokens transformers keeps."""
    scores = torch.tensor(LOGITS)
    for warper in warpers:
        scores = warper(None, scores)
    return torch.isfinite(scores).numpy()


def kept(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    return np.isfinite(truncate(jnp.asarray(LOGITS / np.float32(temperature)), top_k, top_p))


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (6, 0.7), (50, 0.3), (99, 1.0)])
def test_support_is_that_of_transformers(temperature, top_k, top_p):
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    np.testing.assert_array_equal(kept(temperature, top_k, top_p), warped(warpers))


def test_the_order_matters():
    """Mutation partner: top-p before top-k, or before temperature, keeps other tokens."""
    ours = kept(1.5, 6, 0.7)
    t, k, p = TemperatureLogitsWarper(1.5), TopKLogitsWarper(6), TopPLogitsWarper(0.7)
    assert (ours != warped([t, p, k])).any()
    assert (ours != warped([p, t, k])).any()
