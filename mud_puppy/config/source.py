"""Where keys come from: a YAML file, a mapping, flags. Each value keeps a label for error messages.

Labels: `lora.yaml:7: lora_r` (file and line), `config: lora_r` (a mapping), `--lora-r` (a flag).
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mud_puppy.config.schema import REQUIRED, convert
from mud_puppy.errors import UserError, nearest, nearest_file


@dataclass(frozen=True)
class Given:
    """A value that someone set, and how to name its source."""

    value: Any
    label: str


def flag(key: str) -> str:
    """The command-line flag of a key: `--lora-r`; `-n` when the key is one letter."""
    return ("--" if len(key) > 1 else "-") + key.replace("_", "-")


def from_source(source: Mapping[str, Any] | str | os.PathLike) -> dict[str, Given]:
    """The keys of a mapping or of a YAML file, unconverted."""
    if isinstance(source, Mapping):
        return {str(k): Given(v, f"config: {k}") for k, v in source.items()}
    return _from_yaml(Path(source))


def from_flags(overrides: Mapping[str, Any]) -> dict[str, Given]:
    """The keys set on the command line (or by `overrides=`), unconverted."""
    return {k: Given(v, flag(k)) for k, v in overrides.items()}


def convert_all(
    keys: Mapping[str, dataclasses.Field], given: Mapping[str, Given], missing_hint: str = ""
) -> dict[str, Any]:
    """All given values, converted; UserError for an unknown key or one that is missing."""
    for name, item in given.items():
        if name not in keys:
            hint = nearest(name, keys)
            raise UserError(f"{item.label}: unknown key.{hint} docs/config.md lists all keys.")
    values = {name: convert(keys[name], item.value, item.label) for name, item in given.items()}
    for name, spec in keys.items():
        if spec.default is REQUIRED and name not in values:
            hint = missing_hint.format(name=name)
            raise UserError(f"{name} is missing: give {flag(name)}{hint}.")
    return values


def _from_yaml(path: Path) -> dict[str, Given]:
    """The top level of a YAML file; a key given twice is an error (YAML itself keeps the last)."""
    text = _text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise UserError(
                f"{path}: the config is empty; give at least model, dataset and output."
            )
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: the config is not a list of `key: value` lines.")
        found: dict[str, Given] = {}
        for key_node, value_node in root.value:
            name = str(key_node.value)
            label = f"{path}:{key_node.start_mark.line + 1}: {name}"
            if name in found:
                raise UserError(f"{label}: the key stands twice in this file; remove one.")
            found[name] = Given(loader.construct_object(value_node, deep=True), label)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_mark(error)}: not valid YAML ({_problem(error)}).") from None
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file.{nearest_file(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None


def _mark(error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return problem or str(error).splitlines()[0]
