"""What the data room hands on: tokenized examples, and the account of what happened on the way.

An `Example` is one training sequence with a weight for each token; the others are built of it: two
answers (`PairExample`), an answer with a label (`RatedExample`), an answer in steps
(`StepsExample`), a sequence with a teacher's words (`TaughtExample`). All have `sequences`, `size`,
`trained` and `where`. A `Dataset` is a tuple of examples of one kind with a `Report` of everything
that was cut, dropped or found bad. Nothing here knows a tokenizer or a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from jaxtyping import Float32, Int32

from mud_puppy.data.report import Report
from mud_puppy.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence; `weights[i]` is the weight of predicting `tokens[i]` (1 = trained), so
    `weights[0]` is 0."""

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    where: str

    @property
    def sequences(self) -> tuple["Example"]:
        """Itself: it is one sequence."""
        return (self,)

    @property
    def size(self) -> int:
        """The tokens that it takes in a row."""
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """How many of its tokens are trained on."""
        return int(np.count_nonzero(self.weights))

    def since(self, start: int) -> "Example":
        """Its tokens from this one on, which is no longer predicted."""
        return Example(self.tokens[start:], self.weights[start:], self.where)


class _Built(Protocol):
    """What follows from the sequences that an example is built of."""

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What is read, each from its first token on."""
        ...

    @property
    def starts(self) -> tuple[int, ...]:
        """Where in each of the sequences its segment of a row begins: at its first token, unless a
        segment before it holds the tokens left out."""
        return (0,) * len(self.sequences)

    @property
    def segments(self) -> tuple[Example, ...]:
        """What stands side by side in a row: the sequences from their starts on."""
        pairs = zip(self.sequences, self.starts, strict=True)
        return tuple(one.since(start) if start else one for one, start in pairs)

    @property
    def size(self) -> int:
        """The tokens that it takes in a row."""
        return sum(one.size for one in self.sequences) - sum(self.starts)

    @property
    def trained(self) -> int:
        """How many of its tokens are trained on, or read."""
        return sum(one.trained for one in self.sequences)

    @property
    def where(self) -> str:
        """File and line."""
        return self.sequences[0].where


@dataclass(frozen=True, eq=False)
class PairExample(_Built):
    """Two answers to one prompt, each with the prompt before it.

    shared: the leading tokens that both have and of which none is weighted: the prompt. margin: by
    how much the chosen answer is better. prompt_once: in a row the rejected answer begins with the
    prompt's last token, which predicts its first; the tokens before it are a prefix that it sees in
    the chosen answer's segment.
    """

    chosen: Example
    rejected: Example
    shared: int
    margin: float = 0.0
    source: str = ""
    prompt_once: bool = False

    @property
    def sequences(self) -> tuple[Example, Example]:
        """The chosen and the rejected answer."""
        return (self.chosen, self.rejected)

    @property
    def starts(self) -> tuple[int, int]:
        """The second number is the length of the prefix."""
        return (0, max(self.shared - 1, 0) if self.prompt_once else 0)


@dataclass(frozen=True, eq=False)
class RatedExample(_Built):
    """An answer and its label: 1.0 or 0.0 (wanted or not), or a score. shared: the tokens before
    the answer."""

    example: Example
    shared: int
    label: float
    source: str = ""

    @property
    def sequences(self) -> tuple[Example]:
        """The one sequence."""
        return (self.example,)


@dataclass(frozen=True, eq=False)
class StepsExample(_Built):
    """An answer in steps. The example's weights are 1 on each step's last token (the token that is
    read, not one that is predicted), and `labels` is 1 there where the step is right."""

    example: Example
    labels: Int32[np.ndarray, " n"]
    source: str = ""

    @property
    def sequences(self) -> tuple[Example]:
        """The one sequence."""
        return (self.example,)


@dataclass(frozen=True, eq=False)
class TaughtExample(_Built):
    """A sequence, and after each of its tokens the k likeliest tokens that a teacher names and
    their log-probabilities; -1 is no token. The last token's are not looked at."""

    example: Example
    ids: Int32[np.ndarray, "n k"]
    logps: Float32[np.ndarray, "n k"]
    source: str = ""

    @property
    def sequences(self) -> tuple[Example]:
        """The one sequence."""
        return (self.example,)


AnyExample = Example | PairExample | RatedExample | StepsExample | TaughtExample
Kind = TypeVar("Kind", bound=AnyExample)


@dataclass(frozen=True, eq=False)
class Dataset(Generic[Kind]):
    """Examples in the order of their rows, and the report of how they came about."""

    examples: tuple[Kind, ...]
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
