"""Fields of a row, each checked for its type: texts, messages, tools, numbers.

Every function takes the value and where it stands, and raises UserError (`file:line: what`) for a
value of another kind. Which fields a row must have is `formats.py` and `preferences.py`.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from mud_puppy.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")
Columns = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One message as the chat template gets it; `train` is False where the data say not to learn
    from it. `mark` is what text without a chat template has before it."""

    message: Columns
    train: bool = True
    mark: str = ""

    @property
    def role(self) -> str:
        """One of ROLES."""
        return self.message["role"]

    @property
    def content(self) -> str:
        """Its text, empty for a turn that only calls tools."""
        return self.message["content"]


def as_columns(value: object, where: str) -> Columns:
    """The fields of a row that are not null."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object with named fields, not {kind_of(value)}")
    return {name: field for name, field in value.items() if field is not None}


def as_text(value: object, name: str, where: str) -> str:
    """Text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, not {kind_of(value)}")
    return _encodable(value, name, where)


def as_number(value: object, name: str, where: str) -> float:
    """A finite number, also as text (CSV knows nothing else)."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(value) if isinstance(value, str) else kind_of(value)
        raise UserError(f"{where}: {name} must be a finite number, not {shown}")
    return number


def as_truth(value: object, name: str, where: str) -> bool:
    """true or false, also as 1 or 0, or as text."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "1"):
        return True
    if word in (False, "false", "0"):
        return False
    shown = repr(value) if isinstance(value, str) else kind_of(value)
    raise UserError(f"{where}: {name} must be true or false (or 1 or 0), not {shown}")


def as_turns(messages: object, where: str) -> tuple[Turn, ...]:
    """A list of messages, at least one."""
    if not isinstance(messages, list):
        raise UserError(f"{where} must be a list of messages, not {kind_of(messages)}")
    if not messages:
        raise UserError(f"{where} is an empty list")
    return tuple(_turn(message, f"{where}[{i}]") for i, message in enumerate(messages))


def as_tools(row: Columns, where: str) -> list[Any] | None:
    """The row's column `tools`, or None."""
    tools = row.get("tools")
    if isinstance(tools, str):  # hub data sets keep their schemas as JSON text
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where}: tools is not JSON: {error}") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(t, dict) for t in tools)
    ):
        raise UserError(f"{where}: tools must be a list of objects, not {kind_of(tools)}")
    return tools


def kind_of(value: object) -> str:
    """What a value is, in words for an error."""
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


def listed(row: Columns) -> str:
    """The names of a row's columns."""
    return ", ".join(repr(name) for name in row) or "(none)"


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f"{where} must be an object with role and content, not {kind_of(message)}")
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
        return as_text(content, "content", where)
    return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return as_text(part.get("text"), "text", where)
    if isinstance(part, dict):
        raise UserError(f"{where} is a part of type {part.get('type')!r}; only text parts are read")
    return as_text(part, "a part", where)


def _trained(fields: Columns, where: str) -> bool:
    train, weight = fields.get("train", True), fields.get("weight", 1)
    if not isinstance(train, bool):
        raise UserError(f"{where}: train must be true or false, not {train!r}")
    if weight not in (0, 1):
        raise UserError(f"{where}: weight must be 0 or 1, not {weight!r}")
    return train and bool(weight)


def _encodable(text: str, name: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"{where}: {name} holds half a character (U+{code:04X})") from error
    return text
