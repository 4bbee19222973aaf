"""What each method reads: the form of its rows, how they are encoded, and its batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from mud_puppy.config import Config
from mud_puppy.config.preference import KTO
from mud_puppy.data import (
    Chat,
    Dataset,
    PairRow,
    RatedRow,
    StepsRow,
    collate_pairs,
    collate_rated,
    collate_sft,
    collate_steps,
    collate_taught,
    convert,
    convert_pair,
    convert_scored,
    convert_steps,
    convert_unpaired,
    encode,
    encode_pairs,
    encode_rated,
    encode_steps,
    kl_row_length,
)
from mud_puppy.run.teacher import top_k_of

Collate = Callable[[Sequence[Sequence[Any]], int, int], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """convert: of `data.read_rows`; encode(rows, tokenizer, options) -> Dataset; collate: of
    `data.Loader`. kl: whether batches hold each prompt with another's answer too. sequences: of
    max_seq_length tokens, that an example may have. cached: whether the reference's
    log-probabilities come with them (`run.cached`)."""

    convert: Callable[[Any, str], tuple[Any, frozenset[str]]]
    encode: Callable[..., Dataset]
    collate: Callable[..., dict[str, Any]]
    kl: bool = False
    sequences: int = 1
    cached: bool = False

    def collate_of(self, examples: Sequence[Any]) -> Collate:
        """`collate`, for batches of these examples."""
        if not self.kl:
            return self.collate
        size = cache(partial(kl_row_length, examples))
        return lambda rows, length, most: self.collate(rows, length, most, size(length, most))

    def empty(self, length: int) -> dict[str, Any]:
        """The arrays of one row of `length` tokens without an example, for their shapes."""
        # A prompt may meet an answer that is as long as its own sequence.
        kl = {"kl_length": 2 * length} if self.kl else {}
        row = self.collate([[]], length, 1, **kl)
        return row | ({"reference_logps": np.zeros_like(row["weights"])} if self.cached else {})


def kind_of(config: Config, pad_token_id: int | None = None) -> Kind:
    """What a run of this config reads. pad_token_id: the reward model's (`data.collate_pairs`)."""
    if config.method == "preference":
        name, cached = next(iter(config.losses)), config.reference == "cached"
        if name in KTO:
            rated = Kind(convert_unpaired, encode_rated, collate_rated)
            return replace(rated, kl=name == "kto", cached=cached)
        pairs = _pairs(config, ld_alpha=config.ld_alpha, train_on_prompt=config.train_on_prompt)
        converter = partial(convert_pair, margins=False)
        return Kind(converter, *pairs, sequences=2, cached=cached)
    if config.method == "rm" and config.reward == "labels":
        return Kind(convert_scored, encode_rated, partial(collate_rated, pad_token_id=pad_token_id))
    if config.method == "rm":
        converter = partial(convert_pair, whole_texts=True)
        return Kind(converter, *_pairs(config, pad_token_id=pad_token_id), sequences=2)
    if config.method == "prm":
        return Kind(convert_steps, encode_steps, collate_steps)
    # With a teacher's words the examples come by `run.taught`.
    k = top_k_of(config)
    return Kind(convert, encode, partial(collate_taught, k=k) if k else collate_sft)


def _pairs(config: Config, **options: Any) -> tuple[Callable, Callable]:
    """How pairs are encoded, and their batches with these options of `collate_pairs`."""
    once = config.shared_prefix
    encode = partial(encode_pairs, prompt_once=once)
    return encode, partial(collate_pairs, shared_prefix=once, **options)


def conversation(row: Any) -> Chat | None:
    """The conversation of a row, of which a prompt can be asked; None for a plain text."""
    match row:
        case PairRow():
            return conversation(row.chosen)
        case RatedRow():
            return conversation(row.answered)
        case StepsRow():
            return row.prompt
    return row if isinstance(row, Chat) else None
