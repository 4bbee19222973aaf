"""What a row of a supervised data set may look like, and its conversion to one of two shapes.

A `Chat` (a list of turns) comes from `messages`, `prompt`+`completion`,
`instruction`(+`input`)+`response` or `output`, and `input`+`output`; a `Text` is trained on as it
stands. The first format in `FORMATS` whose columns a row has is taken; other columns are not used,
and are named to the caller.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mud_puppy.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")
Columns = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One message as the chat template gets it; `train` is False where the data say not to learn
    from it."""

    message: Columns
    train: bool = True

    @property
    def role(self) -> str:
        """One of ROLES."""
        return self.message["role"]

    @property
    def content(self) -> str:
        """Its text, empty for a turn that only calls tools."""
        return self.message["content"]


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
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object with named fields, not {_kind(value)}")
    row = {name: field for name, field in value.items() if field is not None}
    for form in FORMATS:
        if row.keys() >= set(form.needs):
            return form.build(row, where), frozenset(row.keys() - {*form.needs, *form.may})
    raise UserError(
        f"{where}: no known format has the columns {_listed(row)}; known are {described()}"
    )


def described() -> str:
    """The known formats in words."""
    return ", ".join(" + ".join(form.needs) for form in FORMATS)


def _messages(row: Columns, where: str) -> Chat:
    return Chat(_turns(row["messages"], f"{where}: messages"), where, _tools(row, where))


def _completion(row: Columns, where: str) -> Chat:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        # As TRL does: plain completions follow their prompt without a separator.
        return _exchange(prompt, completion, where, ("prompt", "completion"), separator="")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"{_kind(prompt)} and {_kind(completion)}"
        raise UserError(
            f"{where}: prompt and completion must both be text or both messages, not {kinds}"
        )
    given = _turns(prompt, f"{where}: prompt")
    turns = tuple(Turn(turn.message, train=False) for turn in given)
    return Chat(turns + _turns(completion, f"{where}: completion"), where, _tools(row, where))


def _instruction(answer: str) -> Callable[[Columns, str], Chat]:
    def build(row: Columns, where: str) -> Chat:
        asked = _text(row["instruction"], "instruction", where)
        extra = _text(row.get("input", ""), "input", where)
        prompt = f"{asked}\n\n{extra}" if extra.strip() else asked
        return _exchange(prompt, row[answer], where, ("instruction", answer))

    return build


def _input_output(row: Columns, where: str) -> Chat:
    return _exchange(row["input"], row["output"], where, ("input", "output"))


def _plain(row: Columns, where: str) -> Text:
    text = _text(row["text"], "text", where)
    if not text.strip():
        raise UserError(f"{where}: text is empty")
    return Text(text, where)


FORMATS = (
    Format(("messages",), _messages, ("tools",)),
    Format(("prompt", "completion"), _completion, ("tools",)),
    Format(("instruction", "response"), _instruction("response"), ("input",)),
    Format(("instruction", "output"), _instruction("output"), ("input",)),
    Format(("input", "output"), _input_output),
    Format(("text",), _plain),
)


def _exchange(
    prompt: object, answer: object, where: str, names: tuple[str, str], separator: str = "\n"
) -> Chat:
    asked = {"role": "user", "content": _text(prompt, names[0], where)}
    given = {"role": "assistant", "content": _text(answer, names[1], where)}
    return Chat((Turn(asked), Turn(given)), where, separator=separator)


def _turns(messages: object, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise UserError(f"{where} must be a list of messages, not {_kind(messages)}")
    if not messages:
        raise UserError(f"{where} is an empty list")
    return tuple(_turn(message, f"{where}[{i}]") for i, message in enumerate(messages))


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f"{where} must be an object with role and content, not {_kind(message)}")
    fields = {name: field for name, field in message.items() if field is not None}
    role = fields.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}.{hint}")
    train = _trained(fields, where)
    content = _content(fields, where)
    rest = {k: v for k, v in fields.items() if k not in ("role", "content", "train", "weight")}
    if rest:
        _encodable(json.dumps(rest, ensure_ascii=False, default=str), "a field", where)
    return Turn({"role": role, "content": content, **rest}, train)


def _content(fields: Columns, where: str) -> str:
    if "content" not in fields and fields.get("tool_calls"):
        return ""
    if "content" not in fields:
        raise UserError(f"{where} has no content")
    content = fields["content"]
    if not isinstance(content, list):
        return _text(content, "content", where)
    return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return _text(part.get("text"), "text", where)
    if isinstance(part, dict):
        raise UserError(f"{where} is a part of type {part.get('type')!r}; only text parts are read")
    return _text(part, "a part", where)


def _trained(fields: Columns, where: str) -> bool:
    train, weight = fields.get("train", True), fields.get("weight", 1)
    if not isinstance(train, bool):
        raise UserError(f"{where}: train must be true or false, not {train!r}")
    if weight not in (0, 1):
        raise UserError(f"{where}: weight must be 0 or 1, not {weight!r}")
    return train and bool(weight)


def _tools(row: Columns, where: str) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # hub data sets keep their schemas as JSON text
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where}: tools is not JSON: {error}") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(t, dict) for t in tools)
    ):
        raise UserError(f"{where}: tools must be a list of objects, not {_kind(tools)}")
    return tools


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, not {_kind(value)}")
    return _encodable(value, name, where)


def _encodable(text: str, name: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"{where}: {name} holds half a character (U+{code:04X})") from error
    return text


def _kind(value: object) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(
        type(value), f"a number ({value!r})" if isinstance(value, int | float) else repr(value)
    )


def _listed(row: Columns) -> str:
    return ", ".join(repr(name) for name in row) or "(none)"
