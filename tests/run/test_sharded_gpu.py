"""Gradients on two cards against one: XLA once partitioned cuDNN's backward pass wrongly.

Run with `JAX_PLATFORMS=cuda python -m pytest -m gpu tests/run` on a machine with two cards.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig

from mud_puppy.model import axes, build, init, scan_layers
from mud_puppy.model.families import read_config
from mud_puppy.parallel import batch_sharding, make_mesh, shardings
from mud_puppy.run.methods import SFT
from mud_puppy.weights import add_lora, combine, partition

pytestmark = pytest.mark.gpu
SHAPE = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, vocab_size=4096)
HEADS = dict(num_attention_heads=8, num_key_value_heads=4)


def gradients(spec: str, segment: int) -> list[np.ndarray]:
    """Adapter gradients of one batch of 4 rows of 256, packed in examples of `segment` tokens."""
    arch = read_config(LlamaConfig(**SHAPE, **HEADS))
    model = replace(build(arch)[0], dtype="bfloat16")
    mesh = make_mesh(spec)
    slot = np.broadcast_to(np.arange(256), (1, 4, 256))
    tokens = np.random.default_rng(0).integers(0, 4096, (1, 4, 256))
    batch = {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, -1).astype(np.int32),
        "positions": (slot % segment).astype(np.int32),
        "segment_ids": (slot // segment + 1).astype(np.int32),
        "weights": np.ones(tokens.shape, np.float32),
    }
    with jax.set_mesh(mesh):
        params = init(arch, jax.random.key(0), "bfloat16")
        params = add_lora(params, key=jax.random.key(1))
        params = jax.device_put(params, shardings(mesh, axes(arch), params))
        train, frozen = partition(params)
        batch = jax.device_put(batch, {k: batch_sharding(mesh, 3) for k in batch})

        def loss(train, frozen, batch):
            micro = {k: x[0] for k, x in batch.items()}
            scores = SFT.score(model, combine(train, frozen), None, micro, scan_layers)
            return SFT.loss(scores, micro, jnp.float32(1024))[0]

        grads = jax.jit(jax.grad(loss))(train, frozen, batch)
        return [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]


@pytest.mark.parametrize("spec", ["data=2", "fsdp=2"])
@pytest.mark.parametrize("segment", [256, 64])
def test_two_cards_give_the_gradients_of_one(spec, segment):
    assert len(jax.devices()) >= 2, "needs two cards"
    two, one = gradients(spec, segment), gradients("data=1,fsdp=1", segment)
    for a, b in zip(two, one, strict=True):
        # bfloat16 rounds at 4e-3; the wrong partition was 0.1 off.
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)
