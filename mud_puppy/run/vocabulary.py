"""The run's tokenizer with its `added_tokens`, and the model that fits: a row for each of them, and
the head that the method trains."""

from typing import Any

import jax
from tokenizers import AddedToken

from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.model import Model, load_tokenizer, resize_embeddings, with_score_head

Tree = Any

# What the methods that train a head of scores ask of it: the task and its labels.
SCORES = {"rm": ("sequence", 1), "prm": ("token", 2)}


def run_tokenizer(config: Config) -> Any:
    """The model's tokenizer, which takes each of the added tokens as one."""
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if config.added_tokens:
        # Not special: what is generated shows them. Not normalized: found as they are written.
        added = [AddedToken(token, normalized=False) for token in config.added_tokens]
        tokenizer.add_tokens(added)
    return tokenizer


def with_room(
    config: Config, model: Model, params: Tree, tokenizer: Any = None
) -> tuple[Model, Tree]:
    """The model with a row for each token of `run_tokenizer`, where tokens are added."""
    if not config.added_tokens:
        return model, params
    tokenizer = run_tokenizer(config) if tokenizer is None else tokenizer
    return resize_embeddings(model, params, max(tokenizer.get_vocab().values()) + 1)


def with_scores(
    config: Config, model: Model, params: Tree, pad_token_id: int | None = None
) -> tuple[Model, Tree]:
    """The model with a head of scores, where the method trains one and it has none.

    UserError for a model of scores where the method needs words, or other scores.
    """
    if config.method not in SCORES:
        if model.arch.task != "lm" and config.method != "gptq":
            raise UserError(
                f"{config.model}: gives {model.arch.labels} scores of each {model.arch.task}, no "
                f"words, which method {config.method} needs; methods rm and prm train it"
            )
        return model, params
    task, labels = SCORES[config.method]
    if model.arch.task != "lm":
        if (model.arch.task, model.arch.labels) != (task, labels):
            raise UserError(
                f"{config.model}: has {model.arch.labels} scores of each {model.arch.task}; method "
                f"{config.method} trains {labels} of each {task}"
            )
        return model, params
    key = jax.random.key((config.seed + 2) % 2**32)
    return with_score_head(model, params, labels, task, key=key, pad_token_id=pad_token_id)
