"""`generate`: prompts to texts. `generate_tokens`: token ids to token ids, what rollouts use."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mud_puppy.errors import UserError
from mud_puppy.model.module import Model
from mud_puppy.parallel import batch_devices
from mud_puppy.parallel.rules import BATCH
from mud_puppy.sampling.batches import Batch, batches, bucket
from mud_puppy.sampling.choose import Options, chooser
from mud_puppy.sampling.engine import NOT_WRITTEN, State, resume, start
from mud_puppy.sampling.prompts import Prompt, check, eos_ids, tokenize
from mud_puppy.sampling.turning import Reply, in_two_parts

Tree = Any

# Tokens between two looks at the text when there are stop strings.
_STOP_CHUNK = 16


def generate(
    model: Model,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool | None = None,
    batch_size: int = 16,
) -> list[str]:
    """The reply to each prompt, a text or a list of chat messages (`prompts.tokenize` on `chat`).

    A reply ends at an EOS (`eos_ids`), before the first of the `stop` texts, or after
    max_new_tokens. It does not depend on the other prompts of its batch; params that are sharded
    over a mesh are used as they are. Raises UserError for an empty or too long prompt and for
    options out of range.
    """
    options = Options(max_new_tokens, temperature, top_k, top_p, seed)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise UserError("stop holds an empty text, which would end every reply at once")
    tokens = tokenize(tokenizer, prompts, chat)
    eos = eos_ids(model, tokenizer)

    def stopped(reply: list[int]) -> bool:
        text = detokenize(tokenizer, reply, eos)
        return any(word in text for word in stop)

    replies = generate_tokens(
        model, params, tokens, options, eos, batch_size, stopped if stop else None
    )
    return [_before(detokenize(tokenizer, reply.tokens, eos), stop) for reply in replies]


def generate_tokens(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    options: Options = Options(),  # noqa: B008 (frozen)
    eos: Sequence[int] = (),
    batch_size: int = 16,
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[Reply]:
    """The reply to each prompt of token ids, in order; pure.

    `stopped(tokens so far)` is asked every few tokens and ends a row where it is true; the row's
    reply then runs up to a few tokens further than the first place where it was.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, expected at least 1")
    check(model.arch, prompts, options.max_new_tokens)

    def run(prompts: Sequence[Sequence[int]], options: Options, stop: Any) -> list[Reply]:
        return _replies(model, params, prompts, options, eos, batch_size, stop)

    return in_two_parts(model.arch, prompts, options, eos, stopped, run)


def _replies(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    options: Options,
    eos: Sequence[int],
    batch_size: int,
    stopped: Callable[[list[int]], bool] | None,
) -> list[Reply]:
    mesh = mesh_of(params)
    replies: dict[int, Reply] = {}
    for batch in batches(prompts, batch_size, batch_devices(mesh) if mesh else 1):
        state = _run(model, params, batch, mesh, options, eos, stopped)
        tokens, logps = np.asarray(state.tokens), np.asarray(state.logps)
        for b, i in enumerate(batch.rows):
            n = int((tokens[b] != NOT_WRITTEN).sum())
            replies[int(i)] = Reply(tokens[b, :n].tolist(), logps[b, :n])
    return [replies[i] for i in range(len(prompts))]


def _run(
    model: Model,
    params: Tree,
    batch: Batch,
    mesh: Mesh | None,
    options: Options,
    eos: Sequence[int],
    stopped: Callable[[list[int]], bool] | None,
) -> State:
    most = options.max_new_tokens
    chunk = min(most, _STOP_CHUNK) if stopped else most
    state = begin(model, params, batch, mesh, options, eos, chunk)
    while stopped and int(state.count) < most:
        ended = _ended(state, stopped)
        if ended.all():
            break
        limit = min(int(state.count) + chunk, most)
        state = replace(state, ended=jax.device_put(ended, state.ended.sharding))
        state = go_on(model, params, state, options, eos, limit)
    return state


def begin(
    model: Model,
    params: Tree,
    batch: Batch,
    mesh: Mesh | None,
    options: Options,
    eos: Sequence[int],
    limit: int,
) -> State:
    """`engine.start` on a batch: the state after `limit` tokens, with room for max_new_tokens."""
    arrays: Any = (batch.tokens, batch.lengths, batch.rows)
    if mesh is not None:
        arrays = jax.device_put(arrays, NamedSharding(mesh, BATCH))
    seed = np.uint32(options.seed % 2**32)
    most = bucket(options.max_new_tokens)
    ends, how = _padded(eos), chooser(options)
    return start(model, most, mesh, params, *arrays, seed, np.int32(limit), ends, how)


def go_on(
    model: Model, params: Tree, state: State, options: Options, eos: Sequence[int], limit: int
) -> State:
    """`engine.resume`, up to `limit` tokens in all; consumes `state`."""
    return resume(model, params, state, np.int32(limit), _padded(eos), chooser(options))


def _padded(eos: Sequence[int]) -> np.ndarray:
    """int32 [E], filled up with an id that no token has, so that E rarely changes."""
    ends = np.full(bucket(len(eos), smallest=8), NOT_WRITTEN, np.int32)
    ends[: len(eos)] = eos
    return ends


def _ended(state: State, stopped: Callable[[list[int]], bool]) -> np.ndarray:
    ended, tokens = np.array(state.ended), np.asarray(state.tokens)
    for b in np.flatnonzero(~ended):
        ended[b] = stopped(tokens[b, : int(state.count)].tolist())
    return ended


def mesh_of(params: Tree) -> Mesh | None:
    """The mesh that params are sharded over; None on one device."""
    sharding = jax.tree.leaves(params["embed"])[0].sharding  # codes, or an array
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        return sharding.mesh  # type: ignore[return-value]
    return None


def detokenize(tokenizer: Any, tokens: Sequence[int], eos: Sequence[int]) -> str:
    """The text of a reply, without its EOS and other special tokens."""
    if tokens and tokens[-1] in eos:
        tokens = tokens[:-1]
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _before(text: str, stop: Sequence[str]) -> str:
    places = [text.index(word) for word in stop if word in text]
    return text[: min(places)] if places else text
