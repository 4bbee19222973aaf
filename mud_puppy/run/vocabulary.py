"""The run's tokenizer with its `added_tokens`, and a model with a row for each of them."""

from typing import Any

from tokenizers import AddedToken

from mud_puppy.config import Config
from mud_puppy.model import Model, load_tokenizer, resize_embeddings

Tree = Any


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
