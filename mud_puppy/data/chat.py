"""Rows to token ids and loss weights.

With a chat template, a conversation is the text that the template makes of it, tokenized as a whole
and never given a second BOS; without one it is its turns joined by the row's separator, with an EOS
after every assistant turn. Offsets of the (fast) tokenizer carry the trained characters over to
tokens. What it does not do: decide about lengths, or read files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from mud_puppy.data.formats import Chat, Row, Text, Turn
from mud_puppy.data.template import Messages, Tokenizer, template_of
from mud_puppy.data.turns import Span, spans_of
from mud_puppy.errors import UserError

SHOWN_CHARACTERS = 240
Encoding = tuple[list[int], list[tuple[int, int]]]  # token ids, and the characters of each


@dataclass(frozen=True)
class MaskOptions:
    """What to train on: which roles' turns, or everything; and whether the chat template is
    used."""

    chat_template: bool = True
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_prompt: bool = False


@dataclass(frozen=True)
class Piece:
    """Text tokenized as one, its trained spans, and whether an EOS follows and is trained."""

    text: str
    spans: tuple[Span, ...] = ()
    eos: bool = False
    train_eos: bool = False


@dataclass(frozen=True)
class Plan:
    """A row as pieces; `everything` trains every token, `bos` starts with what the tokenizer starts
    text with."""

    pieces: tuple[Piece, ...]
    where: str
    bos: bool = True
    everything: bool = False

    @property
    def shown(self) -> str:
        """The text in one line, shortened in the middle."""
        text = " ".join("".join(piece.text for piece in self.pieces).split())
        half = SHOWN_CHARACTERS // 2
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def plan_row(row: Row, tokenizer: Tokenizer, options: MaskOptions) -> Plan:
    """The text pieces of a row and their trained spans.

    Raises UserError that names file and line, and shows the text, for a conversation without a turn
    to train on, one that the template refuses, or one whose turns cannot be located in what the
    template makes of it.
    """
    if isinstance(row, Text):
        # An example of plain text is trained on whole, white space at its end included.
        return Plan((Piece(row.text, eos=True),), row.where, everything=True)
    roles = options.roles_to_train
    wanted = [i for i, turn in enumerate(row.turns) if turn.train and turn.role in roles]
    if not wanted and not options.train_on_prompt:
        raise UserError(f"{row.where}: no {' or '.join(roles)} turn to train on in: {_shown(row)}")
    template = template_of(tokenizer, row.tools) if options.chat_template else None
    if template is None:
        return _plain(row, set(wanted), options.train_on_prompt)
    messages: Messages = [turn.message for turn in row.turns]
    try:
        if options.train_on_prompt:
            return Plan((Piece(template.render(messages)),), row.where, bos=False, everything=True)
        text, spans = spans_of(template, messages, wanted)
    except UserError as error:
        raise UserError(f"{row.where}: {error} in: {_shown(row)}") from error
    found = tuple(span for span in spans if span is not None)
    if len(found) < len(spans):
        lost = wanted[spans.index(None)]
        raise UserError(
            f"{row.where}: cannot tell which part of the chat template's text is messages[{lost}]; "
            f"add {{% generation %}} marks to the template or train without it, in: {_shown(row)}"
        )
    return Plan((Piece(text, found),), row.where, bos=False)


def tokenize(
    plans: Sequence[Plan], tokenizer: Tokenizer
) -> list[tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"], int]]:
    """(tokens, weights, unclosed turns) of each plan; all texts go to the tokenizer in one call.

    `weights[0]` is 0, since nothing predicts the first token. An unclosed turn is a trained one
    whose last token is not one of the tokenizer's added tokens. Weights may be all 0: the caller
    judges.
    """
    texts = [piece.text for plan in plans for piece in plan.pieces]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    start = _start_tokens(tokenizer)
    special = np.array(sorted(tokenizer.added_tokens_decoder), np.int32)
    return [_assemble(plan, ids, start, special, tokenizer.eos_token_id) for plan in plans]


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


def _plain(row: Chat, wanted: set[int], everything: bool) -> Plan:
    """Turns joined by the separator; a piece ends, with an EOS, at each assistant turn."""
    pieces: list[Piece] = []
    text, spans = "", []
    for i, turn in enumerate(row.turns):
        _check_plain(turn, row.where)
        text += (row.separator if text else "") + turn.content
        if i in wanted:
            spans.append(Span(len(text) - len(turn.content), len(text), len(text), trim=False))
        if turn.role == "assistant":
            pieces.append(Piece(text, tuple(spans), eos=True, train_eos=i in wanted))
            text, spans = "", []
    if text:
        pieces.append(Piece(text, tuple(spans)))
    return Plan(tuple(pieces), row.where, everything=everything)


def _check_plain(turn: Turn, where: str) -> None:
    if turn.message.get("tool_calls"):
        raise UserError(
            f"{where}: tool_calls can only be written by a chat template, and there is none"
        )


def _assemble(
    plan: Plan, ids: Iterator[Encoding], start: list[int], special: np.ndarray, eos: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and weights of one plan; takes one encoding from `ids` for each of its pieces."""
    parts = [np.empty(0, np.int32)]
    masks = [np.empty(0, bool)]
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
        unclosed += 0 if piece.eos else open_turns
    tokens = np.concatenate(parts)
    weights = (np.concatenate(masks) | plan.everything).astype(np.float32)
    weights[:1] = 0.0
    return tokens, weights, unclosed


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


def _shown(row: Chat) -> str:
    text = "\n".join(f"[{turn.role}] {turn.content}" for turn in row.turns)
    return Plan((Piece(text),), row.where).shown
