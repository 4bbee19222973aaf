"""Rollouts: answers that the policy samples in the course of its training, as a batch of one shape.

A step's own rows give the prompts: all that stands before an example's last answer. Whether a step
samples, and what, follows from (seed, step) and the params, so that a resumed run samples the same.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from mud_puppy.config import Config
from mud_puppy.data import Batch, Example, Loader, collate_sft
from mud_puppy.errors import UserError
from mud_puppy.model import Model
from mud_puppy.run.prepare import Prepared
from mud_puppy.run.step import State
from mud_puppy.sampling import Options, Reply, context_length, eos_ids, generate_tokens

AT_ONCE = 32  # answers that are sampled in one call
STREAM = 3  # of the run's seed, beside those of data, init and dropout
Sample = Callable[[State, int, Batch], Batch]


def rollouts(
    config: Config, run: Prepared, loader: Loader[Example], tokenizer: object
) -> Sample | None:
    """sample(state, step, batch): the batch itself, or in a share of the steps one of the same
    shape, of the prompts of that step's rows with answers of the state's policy. None where the
    config samples nothing."""
    if not config.distill_on_policy:
        return None
    eos = eos_ids(run.model, tokenizer)

    def sample(state: State, step: int, batch: Batch) -> Batch:
        draw = np.random.default_rng((config.seed, step, STREAM))
        if draw.random() >= config.distill_on_policy:
            return batch
        options = Options(
            config.rollout_max_new_tokens,
            config.rollout_temperature,
            seed=int(draw.integers(2**31)),
        )
        rows = [[loader.examples[i] for i in loader.rows[r]] for r in loader.rows_at(step)]
        prompts = [prompt_of(one).tolist() for row in rows for one in row]
        params = run.params(state)
        replies = iter(generate_tokens(run.model, params, prompts, options, eos, AT_ONCE))
        return _batch([answered(row, replies, loader.length) for row in rows], loader)

    return sample


def check_rollouts(config: Config, model: Model, loader: Loader) -> None:
    """UserError, where the config samples, for an example without a prompt, or whose prompt leaves
    the model no room for an answer."""
    if not config.distill_on_policy:
        return
    most = context_length(model.arch)
    for example in loader.examples:
        size = len(prompt_of(example))
        if size < 2:  # a text's first token, or its BOS
            raise UserError(
                f"{example.where}: has no prompt that the student could answer; "
                "distill_on_policy needs conversations"
            )
        if size + config.rollout_max_new_tokens > most:
            raise UserError(
                f"rollout_max_new_tokens {config.rollout_max_new_tokens}: {example.where} has a "
                f"prompt of {size} tokens, and the model has {most} positions; lower it or "
                "max_seq_length"
            )


def prompt_of(example: Example) -> Int32[np.ndarray, " n"]:
    """The tokens before the last run of trained ones."""
    trained = example.weights > 0
    [begins] = np.nonzero(trained & ~np.append(False, trained[:-1]))
    return example.tokens[: begins[-1]]


def answered(row: Sequence[Example], replies: Iterator[Reply], length: int) -> list[Example]:
    """The row's prompts with the next replies, all of whose tokens are trained on. Where they do
    not fit into `length` tokens together the longest are cut to one size."""
    pairs = [(one, prompt_of(one), next(replies).tokens) for one in row]
    room = length - sum(len(prompt) for _, prompt, _ in pairs)
    most = _most([len(reply) for *_, reply in pairs], room)
    return [_example(one, prompt, reply[:most]) for one, prompt, reply in pairs]


def _example(one: Example, prompt: Int32[np.ndarray, " n"], reply: list[int]) -> Example:
    tokens = np.concatenate([prompt, np.array(reply, np.int32)])
    weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
    return Example(tokens, weights, one.where)


def _most(sizes: Sequence[int], room: int) -> int:
    """The largest bound under which the sizes add up to no more than `room`."""
    left = room
    for i, size in enumerate(sorted(sizes)):
        if size * (len(sizes) - i) > left:
            return left // (len(sizes) - i)
        left -= size
    return max(sizes)


def _batch(rows: list[list[Example]], loader: Loader) -> Batch:
    """The arrays [A, B, T] of a step, filled up with empty rows."""
    lead = loader.accumulation, loader.batch_size
    rows += [[] for _ in range(lead[0] * lead[1] - len(rows))]
    flat = collate_sft(rows, loader.length)
    return {name: array.reshape(*lead, -1) for name, array in flat.items()}
