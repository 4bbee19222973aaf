"""Rows to be scored, to the examples that a reward model reads: the tokens of its training.

Nothing of an answer is cut: what does not fit into max_seq_length loses the start of its prompt,
and an answer that does not fit alone makes its row a bad one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mud_puppy.data.chat import Plan
from mud_puppy.data.encoding import Chunk, EncodeOptions, Task, encode_chunk
from mud_puppy.data.example import RatedExample, StepsExample
from mud_puppy.data.preference_encoding import (
    STEP_SEPARATOR,
    make_rated,
    make_steps,
    plan_answers,
    plan_steps,
)
from mud_puppy.data.preferences import RatedRow, StepsRow
from mud_puppy.data.report import Report
from mud_puppy.data.scorable import Scorable
from mud_puppy.data.template import Tokenizer
from mud_puppy.data.tokens import Encoded, check_tokenizer
from mud_puppy.errors import UserError


@dataclass(frozen=True, eq=False)
class ScorableExample:
    """A row and an example of each of its texts."""

    row: Scorable
    examples: tuple[RatedExample | StepsExample, ...]


def encode_scorable(
    rows: Sequence[Scorable], tokenizer: Tokenizer, options: EncodeOptions
) -> tuple[list[ScorableExample], Report]:
    """A `ScorableExample` of each row, in order, and what was cut or left out.

    Raises UserError for a row that cannot be scored (unless bad rows are skipped), and when none is
    left.
    """
    check_tokenizer(tokenizer)
    examples, report = encode_chunk(rows, tokenizer, options, Task(_plan, _make))
    if not examples:
        raise UserError(f"none of {len(rows)} rows can be scored: {report.bad.messages[0]}")
    # Nothing is learnt here, so that turns which no token ends do no harm.
    return examples, replace(report, unclosed=0)


def _plan(row: Scorable, tokenizer: Tokenizer, options: EncodeOptions) -> list[Plan]:
    plans: list[Plan] = []
    for text in row.texts:
        if isinstance(text, StepsRow):
            plans += plan_steps(text, tokenizer, options, STEP_SEPARATOR)
        else:
            plans += plan_answers(RatedRow(text, 0.0), tokenizer, options)
    return plans


def _make(
    row: Scorable, plans: list[Plan], encoded: list[Encoded], options: EncodeOptions
) -> Chunk:
    examples, report = [], Report()
    for text, plan, tokens in zip(row.texts, plans, encoded, strict=True):
        if isinstance(text, StepsRow):
            made, told = make_steps(STEP_SEPARATOR, text, [plan], [tokens], options)
        else:
            made, told = make_rated(RatedRow(text, 0.0), [plan], [tokens], options)
        if not made:
            raise UserError(
                f"{text.where}: its answer alone is longer than max_seq_length "
                f"{options.max_seq_length}; raise it"
            )
        examples += made
        report += told
    return [ScorableExample(row, tuple(examples))], report
