"""What a row of a supervised data set may look like, and its conversion to one of two shapes.

A `Chat` (a list of turns) comes from `messages`, `prompt`+`completion`,
`instruction`(+`input`)+`response` or `output`, and `input`+`output`; a `Text` is trained on as it
stands. The first format in `FORMATS` whose columns a row has is taken; other columns are not used,
and are named to the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mud_puppy.data.fields import (
    Columns,
    Turn,
    as_columns,
    as_text,
    as_tools,
    as_turns,
    kind_of,
    listed,
)
from mud_puppy.errors import UserError


@dataclass(frozen=True)
class Chat:
    """A conversation. `separator` joins turns where no chat template does."""

    turns: tuple[Turn, ...]
    where: str
    tools: list[Any] | None = None
    separator: str = "\n"


@dataclass(frozen=True)
class Text:
    """Plain text, all of it trained on."""

    text: str
    where: str


Row = Chat | Text


@dataclass(frozen=True)
class Format:
    """Columns a row needs and may have, and the function that builds the Row from them."""

    needs: tuple[str, ...]
    build: Callable[[Columns, str], Row]
    may: tuple[str, ...] = ()


def convert(value: object, where: str) -> tuple[Row, frozenset[str]]:
    """The Row that `value` (one parsed line) stands for, and the names of its columns that were not
    used.

    Raises UserError (`file:line: what`) for anything but an object in one of FORMATS with well-
    typed fields.
    """
    row = as_columns(value, where)
    for form in FORMATS:
        if row.keys() >= set(form.needs):
            return form.build(row, where), frozenset(row.keys() - {*form.needs, *form.may})
    pairs, steps = row.keys() >= {"chosen", "rejected"}, row.keys() >= {"prompt", "labels"}
    hint = "; pairs are for method preference or rm" if pairs else ""
    hint += "; steps with labels are for method prm" if steps else ""
    raise UserError(
        f"{where}: no known format has the columns {listed(row)}; known are {described()}{hint}"
    )


def described() -> str:
    """The known formats in words."""
    return ", ".join(" + ".join(form.needs) for form in FORMATS)


def _messages(row: Columns, where: str) -> Chat:
    return Chat(as_turns(row["messages"], f"{where}: messages"), where, as_tools(row, where))


def completed(row: Columns, where: str) -> Chat:
    """The Chat of prompt and completion, of which only the completion's turns are trained on."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        # As TRL does: plain completions follow their prompt without a separator.
        return exchange(prompt, completion, where, ("prompt", "completion"), separator="")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"{kind_of(prompt)} and {kind_of(completion)}"
        raise UserError(
            f"{where}: prompt and completion must both be text or both messages, not {kinds}"
        )
    given = as_turns(prompt, f"{where}: prompt")
    turns = tuple(Turn(turn.message, train=False) for turn in given)
    return Chat(turns + as_turns(completion, f"{where}: completion"), where, as_tools(row, where))


def _instruction(answer: str) -> Callable[[Columns, str], Chat]:
    def build(row: Columns, where: str) -> Chat:
        asked = as_text(row["instruction"], "instruction", where)
        extra = as_text(row.get("input", ""), "input", where)
        prompt = f"{asked}\n\n{extra}" if extra.strip() else asked
        return exchange(prompt, row[answer], where, ("instruction", answer))

    return build


def _input_output(row: Columns, where: str) -> Chat:
    return exchange(row["input"], row["output"], where, ("input", "output"))


def _plain(row: Columns, where: str) -> Text:
    text = as_text(row["text"], "text", where)
    if not text.strip():
        raise UserError(f"{where}: text is empty")
    return Text(text, where)


FORMATS = (
    Format(("messages",), _messages, ("tools",)),
    Format(("prompt", "completion"), completed, ("tools",)),
    Format(("instruction", "response"), _instruction("response"), ("input",)),
    Format(("instruction", "output"), _instruction("output"), ("input",)),
    Format(("input", "output"), _input_output),
    Format(("text",), _plain),
)


def exchange(
    prompt: object, answer: object, where: str, names: tuple[str, str], separator: str = "\n"
) -> Chat:
    """A question and its answer, both texts."""
    asked = {"role": "user", "content": as_text(prompt, names[0], where)}
    given = {"role": "assistant", "content": as_text(answer, names[1], where)}
    return Chat((Turn(asked), Turn(given)), where, separator=separator)
