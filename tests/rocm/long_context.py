"""The training step of a small QLoRA model over a long row, to be compiled for a card."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from mud_puppy.model import abstract, scan_layers
from mud_puppy.run.methods import SFT
from mud_puppy.run.optimizer import make_optimizer
from mud_puppy.run.step import init_state, make_step
from mud_puppy.weights import add_lora, partition, quantize

SHAPE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def step(tokens: int, tile: int | None, remat: str):
    """(step, shapes of its arguments): nf4, adapters of rank 16, one packed row, bfloat16."""
    model, shapes = abstract(SHAPE)
    model = replace(model, dtype="bfloat16", tile=tile)

    def build():
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), shapes)
        return add_lora(quantize(params, "nf4"), 16, 32, key=jax.random.key(0))

    train, frozen = partition(jax.eval_shape(build))

    def rate(step):
        return 1e-4

    tx = make_optimizer("adamw", rate, train)
    start = partial(init_state, tx=tx, fp16=False)
    state = jax.eval_shape(lambda train: start(train, key=jax.random.key(0)), train)
    whole, real = (jax.ShapeDtypeStruct((1, 1, tokens), kind) for kind in (jnp.int32, jnp.float32))
    names = "tokens", "positions", "segment_ids", "targets"
    batch = dict.fromkeys(names, whole) | {"weights": real}
    run = make_step(model, SFT, tx, rate, partial(scan_layers, remat=remat), 1.0)
    return run, (state, frozen, None, batch)
