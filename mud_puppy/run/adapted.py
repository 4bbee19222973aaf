"""A base model and an adapter that brings a head of scores: a reward model in two folders."""

from pathlib import Path
from typing import Any

import jax

from mud_puppy.model import Model, load_tokenizer, with_score_head
from mud_puppy.weights import adapter_head

Tree = Any


def with_head_of(
    model: Model, params: Tree, adapter: str | Path, pad_token_id: int | None = None
) -> tuple[Model, Tree]:
    """(model, params) with a head of the size that the adapter's has, which `load_adapter` then
    fills; as they are where the adapter brings none, or the model has one. params may be shapes.

    UserError for a family without such a head, and as `adapter_head` for the folder.
    """
    head = adapter_head(adapter)
    if head is None or model.arch.task != "lm":
        return model, params
    task, labels = head
    key = jax.random.key(0)  # of values that are replaced
    return with_score_head(model, params, labels, task, key=key, pad_token_id=pad_token_id)


def tokenizer_of(
    source: str | Path, adapter: str | Path | None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer that the adapter was trained with, where its folder has it (its chat template
    and pad token may be others), or else the model's."""
    if adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file():
        source = adapter
    return load_tokenizer(source, trust_remote_code)
