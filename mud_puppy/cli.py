"""The command line: `mud-puppy MODEL DATASET --output OUT [flags]`, and the verbs of `commands`.

Flags are made from the keys of a dataclass (config/keys.py for training, `commands` for a verb):
one definition gives the flag, its help and its check. Errors are one line and exit code 2.
"""

import argparse
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from mud_puppy.commands import COMMANDS, Command
from mud_puppy.config.keys import KEYS, Config
from mud_puppy.config.output import check_output
from mud_puppy.config.refused import refuse
from mud_puppy.config.schema import allowed, base_type, default_text, keys_of, optional
from mud_puppy.config.source import Given, convert_all, flag
from mud_puppy.errors import UserError, nearest

Keys = Mapping[str, dataclasses.Field]
_CONFIG_HELP = "YAML file with any of the keys of a run"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb or, without one, a training run; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] == "train":
        # Else it would be the name of a model on the hub.
        return _guard(_refuse_train)
    if args and args[0] in COMMANDS:
        return _guard(_run_command, args[0], args[1:])
    return train_main(args)


def train_main(argv: Sequence[str] | None = None) -> int:
    """The training form alone: `python -m mud_puppy.train` comes here; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    return _guard(_run_train, args or ["--help"])


def _refuse_train() -> None:
    raise UserError("train is no verb: leave the word out (mud-puppy MODEL DATASET --output OUT).")


def _guard(run: Any, *args: Any) -> int:
    """Runs; turns the errors that a user can cause into one line and an exit code."""
    try:
        run(*args)
    except UserError as error:
        print("mud-puppy: error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mud-puppy: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mud-puppy preview ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run_train(argv: list[str]) -> None:
    parser = train_parser()
    given = _parse(parser, argv, ("model", "dataset"))
    config = Config.load(given.pop("config", {}), given)
    check_output(config)
    from mud_puppy.train import train  # imports jax; errors above need not wait for it

    _show_log()
    train(config)


def _show_log() -> None:
    """What the rooms have to say goes to stderr, as plain lines."""
    log = logging.getLogger("mud_puppy")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _run_command(name: str, argv: list[str]) -> None:
    command = COMMANDS[name]
    given = _parse(command_parser(name, command), argv, command.positional)
    _show_log()
    keys = keys_of(command.keys)
    labelled = {key: Given(value, flag(key)) for key, value in given.items() if key in keys}
    args = command.keys(**convert_all(keys, labelled))
    if not command.of_config:
        command.run(args)
        return
    rest = {key: value for key, value in given.items() if key not in keys}
    command.run(args, rest.pop("config", {}), rest)


def train_parser() -> argparse.ArgumentParser:
    """The parser of the training form: every key of Config is one flag."""
    verbs = "\n".join(f"  {name:9} {command.help}" for name, command in COMMANDS.items())
    parser = _Parser(
        prog="mud-puppy",
        usage="mud-puppy MODEL DATASET --output OUT [flags]\n       mud-puppy VERB --help",
        description="Fine-tune MODEL on DATASET. Flags win over the keys of --config.",
        epilog=f"verbs:\n{verbs}",
    )
    parser.add_argument("--version", action="version", version=f"mud-puppy {_version()}")
    parser.add_argument("--config", metavar="C", help=_CONFIG_HELP)
    _add_keys(parser, KEYS, ("model", "dataset"))
    return parser


def command_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of one verb: every key of its dataclass is one flag, and of a verb that looks at
    a run, every key of Config too."""
    words = " ".join(word.upper() for word in command.positional)
    usage = f"mud-puppy {name} {words} [flags]"
    parser = _Parser(prog=f"mud-puppy {name}", usage=usage, description=command.keys.__doc__)
    if command.of_config:
        parser.add_argument("--config", metavar="C", help=_CONFIG_HELP)
    _add_keys(parser, keys_of(command.keys), () if command.of_config else command.positional)
    if command.of_config:
        _add_keys(parser, KEYS, command.positional)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, the nearest flag, exit code 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help.")


def _add_keys(parser: argparse.ArgumentParser, keys: Keys, positional: Sequence[str]) -> None:
    for name in positional:
        parser.add_argument(name.upper(), nargs="?", help=f"the same as {flag(name)}")
    sections: dict[str, Any] = {}
    for spec in keys.values():
        title = spec.metadata["section"]
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        _add_flag(sections[title], spec)


def _add_flag(group: Any, spec: dataclasses.Field) -> None:
    text = f"{spec.metadata['help']} ({_describe(spec)})".replace("%", "%%")
    if base_type(spec) is bool:
        group.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, help=text)
        return
    action = "append" if spec.metadata["repeat"] else "store"
    metavar = spec.name.rpartition("_")[2].upper()
    group.add_argument(flag(spec.name), action=action, metavar=metavar, help=text)
    off = spec.metadata["off"]
    if off is not None:
        group.add_argument(
            flag(f"no_{spec.name}"),
            action="store_const",
            const=off,
            dest=spec.name,
            help=f"the same as {flag(spec.name)} {off}",
        )


def _describe(spec: dataclasses.Field) -> str:
    """What a flag takes, where its help does not say so already, and its default."""
    plain = spec.metadata["allow"] is None and base_type(spec) in (str, bool)
    takes = [] if plain else [allowed(spec) + (" or null" if optional(spec) else "")]
    return "; ".join([*takes, default_text(spec)])


def _parse(
    parser: argparse.ArgumentParser, argv: list[str], positional: Sequence[str]
) -> dict[str, Any]:
    """The keys that stand on the command line, as texts; a positional is the flag of its name."""
    _refuse_unknown_flags(parser, argv)
    known, extra = parser.parse_known_args(argv)
    given = vars(known)
    for name in positional:
        if name.upper() not in given:
            continue
        value = given.pop(name.upper())
        if name in given:
            raise UserError(
                f"{name.upper()} and {flag(name)} are both given; remove one."
                f"{nearest(value, COMMANDS)}"
            )
        given[name] = value
    if extra:
        raise UserError(
            f"unexpected argument {extra[0]!r}.{_verb_hint(argv)} See {parser.prog} --help."
        )
    return given


def _refuse_unknown_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Before argparse, whose first complaint would be of what an unknown flag left missing."""
    known = parser._option_string_actions
    for word in argv:
        name = word.partition("=")[0]
        if word == "--":
            return
        # A value may be negative, and `-n3` is `-n 3`.
        if name[:2] in known or name in known or not re.match("--?[A-Za-z]", name) or " " in name:
            continue
        refuse(name.lstrip("-").replace("-", "_"), None, name)
        hint = _verb_hint(argv) or nearest(name, known)
        raise UserError(f"unknown flag {name}.{hint} See {parser.prog} --help.")


def _verb_hint(argv: list[str]) -> str:
    """For `mud-puppy generat MODEL --prompt ...`, where the verb is what is wrong."""
    return "" if argv[0].startswith("-") else nearest(argv[0], COMMANDS)


def _version() -> str:
    try:
        return version("mud_puppy")
    except PackageNotFoundError:
        return "(not installed)"
