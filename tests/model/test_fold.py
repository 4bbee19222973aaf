"""Folding scales into what makes a linear's inputs changes no logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.model.fold import STAGES, fold, shared, spread
from tests.tiny import tiny_model


def make(**fields):
    """A model of random norms and biases."""
    model, params = tiny_model(max_position_embeddings=64, **fields)
    rng = np.random.default_rng(0)

    def noise(x):
        return x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) if x.ndim < 3 else x

    return model, jax.tree.map(noise, params)


def folded(model, params, stages, wrong=None):
    """Every layer with random scales of each stage."""
    rng = np.random.default_rng(1)
    (group,) = params["layers"]
    layers = []
    for r in range(len(group[0]["attn_norm"])):
        block = jax.tree.map(lambda x, r=r: x[r], group[0])
        for stage in stages:
            n = block[stage.part][stage.names[0]]["weight"].shape[1]
            s = np.exp(rng.normal(size=shared(model.arch, stage, jnp.zeros(n)).shape))
            block = fold(model.arch, block, stage, jnp.asarray(s, jnp.float32))
        layers.append(block)
    return {**params, "layers": [[jax.tree.map(lambda *xs: jnp.stack(xs), *layers)]]}


def difference(model, a, b):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 64, (2, 24)), jnp.int32)
    a, b = (np.asarray(model(p, tokens)) for p in (a, b))
    return np.abs(a - b).max() / np.abs(a).max()


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen3", "head_dim": 16},
    ],
    ids=["shared heads", "biases", "q_norm"],
)
def test_logits_stay_as_they_are(fields):
    model, params = make(**fields)
    assert difference(model, params, folded(model, params, STAGES)) < 1e-5


@pytest.mark.parametrize("i", range(4))
def test_each_stage_changes_its_weights(i):
    model, params = make(model_type="llama")
    stage = STAGES[i]
    done = folded(model, params, [stage])
    for name in stage.names:
        a, b = (p["layers"][0][0][stage.part][name]["weight"] for p in (params, done))
        assert np.abs(np.asarray(a - b)).max() > 0.1
    # Without the source's part it is another function.
    half = jax.tree.map(lambda x: x, done)
    block, was = half["layers"][0][0], params["layers"][0][0]
    if stage.source in block:
        block[stage.source] = was[stage.source]
    else:
        block[stage.part][stage.source] = was[stage.part][stage.source]
    assert difference(model, params, half) > 1e-2


def test_heads_that_share_a_key_share_its_scales():
    model, _ = make(model_type="llama")
    stage = STAGES[1]
    x = jnp.arange(32.0)  # 4 heads of 8; 0 and 1 share a key
    means = shared(model.arch, stage, x)
    assert means.tolist() == [i + 4.0 for i in range(8)] + [i + 20.0 for i in range(8)]
    wide = spread(model.arch, stage, jnp.stack([means, 2 * means]))
    assert wide.shape == (2, 32)
    assert wide[0, :16].tolist() == [i + 4.0 for i in range(8)] * 2
    for other in (STAGES[0], STAGES[2], STAGES[3]):
        assert shared(model.arch, other, x) is x and spread(model.arch, other, x) is x
