"""Prefill and decode on the device: one compiled call from prompts to finished rows.

`start` runs the prompts through the model once, filling the KV cache, then decodes in a
`lax.while_loop` until `limit` tokens or until every row has ended. `resume` goes on from the state
that `start` returned, for callers who look at the text in between (stop strings, chat). Shapes are
those of buckets (`batches.py`); limits and sampling options are traced, so they compile nothing.

Prompts are padded on the right and a token's slot is its position, so padding sits in slots that a
row reaches only after its own tokens have overwritten them: nothing is masked by segment.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mud_puppy.model.decoder import Cache, Inputs, logits, make_cache, scan_layers
from mud_puppy.model.module import Model
from mud_puppy.parallel.rules import BATCH
from mud_puppy.sampling.choose import Chooser, choose
from mud_puppy.weights import base_of

Tree = Any
NOT_WRITTEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Generation between two tokens.

    count int32 []: tokens chosen so far in rows that have not ended. token, position int32 [B]: the
    last token of each row and its slot, which the next step fills. ended bool [B]. keys [B].
    tokens int32 [B, N], logps f32 [B, N]: what was chosen, NOT_WRITTEN after a row's end.
    """

    cache: Cache
    count: Any
    token: Any
    position: Any
    ended: Any
    keys: Any
    tokens: Any
    logps: Any


# model, most, mesh
@partial(jax.jit, static_argnums=(0, 1, 2))
def start(
    model: Model,
    most: int,
    mesh: Mesh | None,
    params: Tree,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rows: Int[Array, " B"],
    seed: Any,
    limit: Any,
    eos: Int[Array, " E"],
    how: Chooser,
) -> State:
    """The state after min(limit, most) tokens, or earlier when all rows have ended.

    prompts: padded on the right to T, lengths: what is real. rows: the number of each prompt in the
    caller's list, from which it draws its randomness; negative for rows that only fill the batch.
    """
    B, T = prompts.shape
    key = jax.random.key(seed, impl="threefry2x32")  # its bits do not change under vmap
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    cache = make_cache(model.arch, B, T + most, _dtype(model, params))
    if mesh is not None:
        spread = NamedSharding(mesh, PartitionSpec(None, *BATCH))
        cache = jax.lax.with_sharding_constraint(cache, spread)
    slots = jnp.broadcast_to(jnp.arange(T), (B, T))
    real = (slots < lengths[:, None]).astype(jnp.int32)
    _, cache = _forward(model, params, Inputs(prompts, slots, real), cache)
    # The prompt's last token goes through the model again as the first step's input: one step more,
    # but prefill needs no head, and the choice of a token is compiled in one place.
    state = State(
        cache=cache,
        count=jnp.int32(0),
        token=jnp.take_along_axis(prompts, (lengths - 1)[:, None], axis=1)[:, 0],
        position=lengths - 1,
        ended=rows < 0,
        keys=keys,
        tokens=jnp.full((B, most), NOT_WRITTEN, jnp.int32),
        logps=jnp.zeros((B, most), jnp.float32),
    )
    return _decode(model, params, state, limit, eos, how)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def resume(
    model: Model, params: Tree, state: State, limit: Any, eos: Int[Array, " E"], how: Chooser
) -> State:
    """Decodes on until the rows have `limit` tokens in all, or have ended."""
    return _decode(model, params, state, limit, eos, how)


def _decode(
    model: Model, params: Tree, state: State, limit: Any, eos: Array, how: Chooser
) -> State:
    def going(state: State) -> Array:
        return (state.count < limit) & ~jnp.all(state.ended)

    def step(state: State) -> State:
        B = state.token.shape[0]
        one = Inputs(state.token[:, None], state.position[:, None], jnp.ones((B, 1), jnp.int32))
        hidden, cache = _forward(model, params, one, state.cache)
        state = replace(state, cache=cache)
        return _append(state, logits(model.arch, params, hidden)[:, 0], eos, how)

    return jax.lax.while_loop(going, step, state)


def _append(state: State, logits: Array, eos: Array, how: Chooser) -> State:
    """Chooses a token for every row that goes on; a row that chose an EOS ends with it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    token, logp = choose(logits, keys, how)
    written = jnp.where(state.ended, NOT_WRITTEN, token)
    return replace(
        state,
        count=state.count + 1,
        token=token,
        # An ended row stays where it is, inside of the cache.
        position=jnp.where(state.ended, state.position, state.position + 1),
        ended=state.ended | jnp.any(token[:, None] == eos, axis=-1),
        tokens=state.tokens.at[:, state.count].set(written),
        logps=state.logps.at[:, state.count].set(jnp.where(state.ended, 0.0, logp)),
    )


def _forward(model: Model, params: Tree, inputs: Inputs, cache: Cache) -> tuple[Array, Cache]:
    run_layers = partial(scan_layers, remat="none")
    hidden, filled, _ = model.forward(params, inputs, cache, run_layers)
    assert filled is not None
    return hidden, filled


def _dtype(model: Model, params: Tree) -> Any:
    return jnp.dtype(model.dtype) if model.dtype else base_of(params["embed"]).dtype
