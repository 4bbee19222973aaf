"""Texts with trained characters to token ids and loss weights.

Offsets of the (fast) tokenizer carry the trained characters over to tokens. What it does not do:
decide about lengths, or read files.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from mud_puppy.data.chat import Piece, Plan
from mud_puppy.data.template import Tokenizer
from mud_puppy.errors import UserError

Encoding = tuple[list[int], list[tuple[int, int]]]  # token ids, and the characters of each


class Encoded(NamedTuple):
    """A plan's tokens. weights[0] is 0, since nothing predicts the first token; all may be 0: the
    caller judges.

    unclosed: trained turns whose last token is not one of the tokenizer's added tokens. lead: how
    many tokens at the start are the BOS, or what else the tokenizer starts a text with. ends: the
    tokens up to each piece's end.
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    unclosed: int
    lead: int
    ends: tuple[int, ...]


def tokenize(plans: Sequence[Plan], tokenizer: Tokenizer) -> list[Encoded]:
    """Each plan's tokens; all texts go to the tokenizer in one call."""
    if not plans:
        return []
    texts = [piece.text for plan in plans for piece in plan.pieces]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    start = _start_tokens(tokenizer)
    special = np.array(sorted(tokenizer.added_tokens_decoder), np.int32)
    bos_eos = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [_assemble(plan, ids, start, special, bos_eos) for plan in plans]


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises UserError unless the tokenizer maps characters to tokens and has an EOS."""
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise UserError(
            f"tokenizer {name} is a slow one, without character offsets; a fast one is needed"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token; set eos_token in its tokenizer_config.json"
        )


def _assemble(
    plan: Plan,
    ids: Iterator[Encoding],
    start: list[int],
    special: np.ndarray,
    bos_eos: tuple[int | None, int],
) -> Encoded:
    """Tokens and weights of one plan; takes one encoding from `ids` for each of its pieces."""
    bos, eos = bos_eos
    parts = [np.empty(0, np.int32)]
    masks = [np.empty(0, bool)]
    sizes: list[int] = []
    unclosed = 0
    for k, piece in enumerate(plan.pieces):
        tokens, offsets = next(ids)
        tokens = np.array(tokens, np.int32)
        mask, open_turns = _mask(tokens, np.array(offsets, np.int64).reshape(-1, 2), special, piece)
        if k == 0 and plan.bos and tokens[: len(start)].tolist() != start:
            parts.append(np.array(start, np.int32))
            masks.append(np.zeros(len(start), bool))
        if piece.eos and (len(tokens) == 0 or tokens[-1] != eos):
            tokens, mask = np.append(tokens, np.int32(eos)), np.append(mask, piece.train_eos)
        parts.append(tokens)
        masks.append(mask)
        sizes.append(len(tokens))
        unclosed += 0 if piece.eos else open_turns
    tokens = np.concatenate(parts)
    weights = (np.concatenate(masks) | plan.everything).astype(np.float32)
    weights[:1] = 0.0
    known = len(start) if tokens[: len(start)].tolist() == start else 0
    lead = known or int(len(tokens) > 0 and tokens[0] == bos)
    ends = len(tokens) - sum(sizes) + np.cumsum(sizes)
    return Encoded(tokens, weights, unclosed, lead, tuple(ends.tolist()))


def _mask(
    tokens: np.ndarray, offsets: np.ndarray, special: np.ndarray, piece: Piece
) -> tuple[np.ndarray, int]:
    """Which tokens lie in the piece's spans, and how many spans do not end in a special token.

    A token that holds characters of a turn's own text belongs to it, even where it begins before
    (the space that sentencepiece joins to a word), unless it is a special token. Of the closing
    text only whole tokens count, and none that is white space after it.
    """
    end = offsets[:, 1]
    # Byte-level BPE gives a lone space the empty range behind it.
    begin = np.minimum(offsets[:, 0], end - 1)
    is_special = np.isin(tokens, special)
    mask = np.zeros(len(tokens), bool)
    unclosed = 0
    for start, content, close, trim in piece.spans:
        inside = (end > start) & ((begin < content) | (end <= close))
        inside &= (begin >= start) | ~is_special
        chosen = np.flatnonzero(inside).tolist()
        while trim and chosen and piece.text[begin[chosen[-1]] : end[chosen[-1]]].isspace():
            chosen.pop()
        unclosed += int(not chosen or not is_special[chosen[-1]])
        mask[chosen] = True
    return mask, unclosed


def _start_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text: the BOS, or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    return encoded["input_ids"][: special.index(0)] if 0 in special else []
