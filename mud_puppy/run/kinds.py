"""What each method reads: the form of its rows, how they are encoded, and its batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

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

Collate = Callable[[Sequence[Sequence[Any]], int, int], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """convert: of `data.read_rows`; encode(rows, tokenizer, options) -> Dataset; collate: of
    `data.Loader`. kl: whether batches hold each prompt with another's answer too."""

    convert: Callable[[Any, str], tuple[Any, frozenset[str]]]
    encode: Callable[..., Dataset]
    collate: Callable[..., dict[str, Any]]
    kl: bool = False

    def collate_of(self, examples: Sequence[Any]) -> Collate:
        """`collate`, for batches of these examples."""
        if not self.kl:
            return self.collate
        size = cache(partial(kl_row_length, examples))
        return lambda rows, length, most: self.collate(rows, length, most, size(length, most))

    def empty(self, length: int) -> dict[str, Any]:
        """The arrays of one row of `length` tokens without an example, for their shapes."""
        kl = {"kl_length": length} if self.kl else {}
        return self.collate([[]], length, 1, **kl)


def kind_of(config: Config, pad_token_id: int | None = None) -> Kind:
    """What a run of this config reads. pad_token_id: the reward model's (`data.collate_pairs`)."""
    if config.method == "preference":
        name = next(iter(config.losses))
        if name in KTO:
            return Kind(convert_unpaired, encode_rated, collate_rated, kl=name == "kto")
        collate = partial(
            collate_pairs, ld_alpha=config.ld_alpha, train_on_prompt=config.train_on_prompt
        )
        return Kind(convert_pair, encode_pairs, collate)
    if config.method == "rm" and config.reward == "labels":
        return Kind(convert_scored, encode_rated, partial(collate_rated, pad_token_id=pad_token_id))
    if config.method == "rm":
        collate = partial(collate_pairs, pad_token_id=pad_token_id)
        return Kind(partial(convert_pair, whole_texts=True), encode_pairs, collate)
    if config.method == "prm":
        return Kind(convert_steps, encode_steps, collate_steps)
    return Kind(convert, encode, collate_sft)


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
