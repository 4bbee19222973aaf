"""What one config key is: its type, its default, what is allowed, and when it has an effect.

`key()` declares a dataclass field that carries all of this; `convert()` turns a value from YAML, a
flag or Python into the field's type or says in one line what is wrong with it. Nothing here knows
the name of any key.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mud_puppy.errors import UserError, nearest

REQUIRED = dataclasses.MISSING
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_LIST_NAME = "a list of names (or one text, separated by commas)"


@dataclass(frozen=True)
class Limit:
    """A range of numbers: the words for it and the test."""

    words: str
    test: Callable[[float], bool]


POSITIVE = Limit("above 0", lambda v: v > 0)
AT_LEAST_1 = Limit("at least 1", lambda v: v >= 1)
AT_LEAST_2 = Limit("at least 2", lambda v: v >= 2)
NOT_NEGATIVE = Limit("at least 0", lambda v: v >= 0)
BELOW_1 = Limit("at least 0 and below 1", lambda v: 0 <= v < 1)
INSIDE_1 = Limit("between 0 and 1", lambda v: 0 < v < 1)


@dataclass(frozen=True)
class Need:
    """When a key has an effect: the words for it and the test on the finished config.

    A key that is given without effect is an error, never ignored; only null, false and 0, where
    they are the default, say that it is off.
    """

    words: str
    test: Callable[[Any], bool]

    def __and__(self, other: "Need") -> "Need":
        return Need(f"{self.words}, and {other.words}", lambda c: self.test(c) and other.test(c))


@dataclass(frozen=True)
class Parser:
    """Replaces the conversion by type: `read` returns the value or raises ValueError."""

    words: str
    read: Callable[[Any], Any]


def key(
    section: str,
    default: Any,
    help: str,
    allow: Limit | Parser | None = None,
    needs: Need | None = None,
    *,
    repeat: bool = False,
    off: str | None = None,
) -> Any:
    """A dataclass field with all that a key knows beside its type; a Literal lists the choices.

    allow: a range for a number, or a parser instead of the conversion by type.
    repeat: the flag may be given several times, and its texts may hold commas.
    off: the choice that false and the flag's `--no-` form mean (true means the default).
    """
    meta = {"section": section, "help": help, "allow": allow, "needs": needs}
    meta |= {"repeat": repeat, "off": off}
    return field(default=default, metadata=meta)


def keys_of(cls: type) -> dict[str, dataclasses.Field]:
    """The keys that a dataclass declares, by name."""
    return {spec.name: spec for spec in dataclasses.fields(cls)}


def optional(spec: dataclasses.Field) -> bool:
    """Whether null is a value of this key."""
    return types.NoneType in typing.get_args(spec.type)


def base_type(spec: dataclasses.Field) -> Any:
    """The key's type without null: bool, int, float, str, tuple (of texts) or Literal."""
    kind = _without_null(spec)
    return typing.get_origin(kind) or kind


def _without_null(spec: dataclasses.Field) -> Any:
    # `Literal[...] | None` is a typing.Union, `int | None` a types.UnionType.
    if typing.get_origin(spec.type) not in (types.UnionType, typing.Union):
        return spec.type
    return next(t for t in typing.get_args(spec.type) if t is not types.NoneType)


def choices(spec: dataclasses.Field) -> tuple[str, ...]:
    """The texts that a key of a Literal type can be; none for other types."""
    return typing.get_args(_without_null(spec)) if base_type(spec) is typing.Literal else ()


def allowed(spec: dataclasses.Field) -> str:
    """The values that a key takes, in words: for errors, help and docs."""
    allow = spec.metadata["allow"]
    if isinstance(allow, Parser):
        return allow.words
    if choices(spec):
        return "one of " + ", ".join(choices(spec))
    words = _TYPE_NAMES.get(base_type(spec), _LIST_NAME)
    return f"{words} {allow.words}" if allow else words


def default_text(spec: dataclasses.Field) -> str:
    """The default of a key, in words: for help and docs."""
    if spec.default is REQUIRED:
        return "required"
    if isinstance(spec.default, tuple):
        return "default " + ", ".join(spec.default)
    return f"default {spec.default if isinstance(spec.default, str) else shown(spec.default)}"


def convert(spec: dataclasses.Field, value: Any, label: str) -> Any:
    """`value` as the key's type; `label` names its source in the one-line error.

    Raises UserError for a wrong type, a number out of range or an unknown choice.
    """
    if optional(spec) and (value is None or value in ("null", "none")):
        return None
    try:
        return _read(spec, value)
    except (ValueError, TypeError, OverflowError) as error:
        allow = spec.metadata["allow"]
        hint = nearest(str(value), choices(spec))
        reason = f" ({error})" if isinstance(allow, Parser) and str(error) else ""
        message = f"{label}: {shown(value)} is not {allowed(spec)}{reason}.{hint}"
        raise UserError(message) from None


def shown(value: Any) -> str:
    """A value as a person wrote it, short enough for one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read(spec: dataclasses.Field, value: Any) -> Any:
    allow = spec.metadata["allow"]
    if isinstance(allow, Parser):
        return allow.read(value)
    if choices(spec):
        off = spec.metadata["off"]
        if isinstance(value, bool) and off is not None:
            value = spec.default if value else off
        return choices(spec)[choices(spec).index(value)]
    result = _READERS[base_type(spec)](value)
    if isinstance(allow, Limit) and not allow.test(result):
        raise ValueError
    return result


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _BOOLS:
        return _BOOLS[value.lower()]
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    # PyYAML reads 2e-4 (no dot) as a text, so texts are numbers here too.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError
    return text


def names(value: Any) -> tuple[str, ...]:
    """A list of texts, or one text separated by commas; at least one name."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError
    found = tuple(part.strip() for part in parts)
    if not found or not all(found):
        raise ValueError
    return found


def texts(value: Any) -> tuple[str, ...]:
    """One text or a list of them, as they are; at least one, none empty."""
    found = (value,) if isinstance(value, str) else tuple(value)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError
    "".join(found).encode()  # bytes of the terminal that are no UTF-8
    return found


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    tuple: names,
}
