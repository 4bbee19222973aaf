"""What the data room hands on: tokenized examples, and the account of what happened on the way.

An `Example` is one training sequence with a weight for each token; a `Dataset` is a tuple of them
with a `Report` of everything that was cut, dropped or found bad. Nothing here knows a tokenizer or
a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int32

from mud_puppy.errors import UserError

MAX_MESSAGES = 1000
SKIP_HINT = "(correct it, or leave bad rows out with on_bad_rows skip)"
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence; `weights[i]` is the weight of predicting `tokens[i]` (1 = trained), so
    `weights[0]` is 0."""

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    where: str

    @property
    def trained(self) -> int:
        """How many of its tokens are trained on."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True)
class BadRows:
    """Rows that were left out because something is wrong with them; `messages` keeps the first
    1,000."""

    count: int = 0
    messages: tuple[str, ...] = ()

    def __add__(self, other: "BadRows") -> "BadRows":
        messages = (self.messages + other.messages)[:MAX_MESSAGES]
        return BadRows(self.count + other.count, messages)


@dataclass(frozen=True)
class Report:
    """What `encode` did to the rows, in counts of examples (`unclosed` counts trained turns).

    truncated: cut to max_seq_length, with trained tokens left.
    too_long: left out by on_long="skip".
    cut_away: left out because cutting would have removed every trained token.
    unclosed: trained turns that no special token ends, so that the model may not learn to stop.
    bad: rows that could not be made into an example, left out by on_bad_rows="skip".
    """

    truncated: int = 0
    too_long: int = 0
    cut_away: int = 0
    unclosed: int = 0
    bad: BadRows = BadRows()

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.truncated + other.truncated,
            self.too_long + other.too_long,
            self.cut_away + other.cut_away,
            self.unclosed + other.unclosed,
            self.bad + other.bad,
        )

    def lines(self) -> list[str]:
        """One sentence for each thing that happened; empty when nothing did."""
        said = (
            (self.truncated, "examples cut to max_seq_length"),
            (self.too_long, "examples left out: longer than max_seq_length"),
            (self.cut_away, "examples left out: max_seq_length cuts off all their trained tokens"),
            (
                self.unclosed,
                "trained turns have no end-of-turn token: the model may not learn to stop",
            ),
            (self.bad.count, "bad rows left out"),
        )
        return [f"{count} {what}" for count, what in said if count] + list(self.bad.messages)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in the order of their rows, and the report of how they came about."""

    examples: tuple[Example, ...]
    report: Report = field(default_factory=Report)

    def __len__(self) -> int:
        return len(self.examples)


def split(items: Sequence[Item], held_out: int | float, seed: int) -> tuple[list[Item], list[Item]]:
    """(kept, held out): a seeded choice of `held_out` items (a count if int, a share if float),
    each side in order.

    Raises UserError when either side would be empty.
    """
    share = isinstance(held_out, float)
    if share and not 0.0 < held_out < 1.0:
        raise UserError(f"an evaluation share must lie between 0 and 1, not {held_out}")
    count = max(1, math.floor(len(items) * held_out + 0.5)) if share else int(held_out)
    if not 1 <= count < len(items):
        raise UserError(
            f"cannot hold out {count} of {len(items)} examples for evaluation: "
            "both sides need at least one; change the evaluation split or give a larger data set"
        )
    chosen = np.random.default_rng(seed).permutation(len(items))[:count].tolist()
    held = frozenset(chosen)
    return [x for i, x in enumerate(items) if i not in held], [items[i] for i in sorted(held)]
