"""The one error a user sees: what is wrong, where, and what to do, in one line.

The command line prints a `UserError` and exits with 2; anything else is a bug and keeps
its traceback.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input: the message says what, where and what to do, in one line."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the choice closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def nearest_file(path: Path) -> str:
    """`nearest` among what lies in the folder that should have held `path`."""
    try:
        beside = {other.name for other in path.parent.iterdir()}
    except OSError:
        return ""
    return nearest(path.name, beside - {path.name})
