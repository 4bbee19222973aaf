"""Rows to the texts that are tokenized, and which characters of them are trained on.

With a chat template, a conversation is the text that the template makes of it, tokenized as a whole
and never given a second BOS; without one it is its turns joined by the row's separator, with an EOS
after every assistant turn. Tokens are made of it in `tokens.py`.
"""

from dataclasses import dataclass

from mud_puppy.data.fields import Turn
from mud_puppy.data.formats import Chat, Row, Text
from mud_puppy.data.template import Messages, Tokenizer, template_of
from mud_puppy.data.turns import Span, spans_of
from mud_puppy.errors import UserError

SHOWN_CHARACTERS = 240


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


def _plain(row: Chat, wanted: set[int], everything: bool) -> Plan:
    """Turns joined by the separator; a piece ends, with an EOS, at each assistant turn."""
    pieces: list[Piece] = []
    text, spans = "", []
    for i, turn in enumerate(row.turns):
        _check_plain(turn, row.where)
        text += (row.separator if text else "") + turn.mark + turn.content
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


def _shown(row: Chat) -> str:
    text = "\n".join(f"[{turn.role}] {turn.content}" for turn in row.turns)
    return Plan((Piece(text),), row.where).shown
