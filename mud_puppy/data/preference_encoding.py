"""Rows of preferences, ratings and rated steps to examples.

A pair is encoded as two conversations, each by the chat template and the mask of supervised
training; only the answers' turns carry weight. What does not fit into max_seq_length loses the
start of its prompt (behind the BOS), never a token of an answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np

from mud_puppy.data.chat import MaskOptions, Piece, Plan, plan_row
from mud_puppy.data.encoding import Chunk, EncodeOptions, Task, encode, too_long, trained_example
from mud_puppy.data.example import (
    Dataset,
    Example,
    PairExample,
    RatedExample,
    StepsExample,
)
from mud_puppy.data.fields import Turn
from mud_puppy.data.formats import Chat
from mud_puppy.data.preferences import PairRow, RatedRow, StepsRow
from mud_puppy.data.report import Report
from mud_puppy.data.template import SENTINEL, Tokenizer
from mud_puppy.data.tokens import Encoded
from mud_puppy.errors import UserError

STEP_SEPARATOR = "\n"  # as in TRL's PRMTrainer


def encode_pairs(
    rows: Sequence[PairRow],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    prompt_once: bool = False,
) -> Dataset[PairExample]:
    """Pairs of answers; both fit into max_seq_length with their prompt, or the pair is left out.

    prompt_once: of `PairExample`. options.train_on_prompt is not used here: `collate_pairs` has its
    own. Raises as `encode`.
    """
    make = partial(_make_pair, prompt_once)
    return encode(rows, tokenizer, options, Task(plan_answers, make))


def encode_rated(
    rows: Sequence[RatedRow | PairRow], tokenizer: Tokenizer, options: EncodeOptions
) -> Dataset[RatedExample]:
    """Answers with labels; a pair gives two, the chosen one labelled 1, the rejected one 0.

    With pairs among the rows all wanted answers come first, as in TRL: neighbours, whose answers
    KTO mixes, then have other prompts.
    """
    data = encode(rows, tokenizer, options, Task(plan_answers, make_rated))
    if not any(isinstance(row, PairRow) for row in rows):
        return data
    return replace(data, examples=tuple(sorted(data.examples, key=lambda one: -one.label)))


def encode_steps(
    rows: Sequence[StepsRow],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    separator: str = STEP_SEPARATOR,
) -> Dataset[StepsExample]:
    """Answers in steps, each followed by the separator, whose last token is the step's end.

    Steps and separators are tokenized one by one, so that no token reaches over an end. The answer
    stands where the chat template (if there is one) puts it; nothing follows it.
    """
    task = Task(partial(plan_steps, separator=separator), partial(make_steps, separator))
    return encode(rows, tokenizer, options, task)


def plan_answers(row: PairRow | RatedRow, tokenizer: Tokenizer, options: MaskOptions) -> list[Plan]:
    """The texts of a row's answers, of which only the answers are trained on."""
    answers_only = replace(options, train_on_prompt=False)
    answers = (row.chosen, row.rejected) if isinstance(row, PairRow) else (row.answered,)
    return [plan_row(answer, tokenizer, answers_only) for answer in answers]


def _make_pair(
    prompt_once: bool,
    row: PairRow,
    plans: list[Plan],
    encoded: list[Encoded],
    options: EncodeOptions,
) -> Chunk:
    chosen, rejected = _answers(plans, encoded)
    count = min(_before_answer(chosen), _before_answer(rejected))
    same = chosen.tokens[:count] == rejected.tokens[:count]
    shared = count if same.all() else int(same.argmin())
    lead = min(one.lead for one in encoded)
    excess, report = _excess((chosen, rejected), shared, lead, options)
    if excess is None:
        return [], report
    better, worse = (_without(example, lead, excess) for example in (chosen, rejected))
    pair = PairExample(better, worse, shared - excess, row.margin, row.source, prompt_once)
    return [pair], report


def make_rated(
    row: RatedRow | PairRow, plans: list[Plan], encoded: list[Encoded], options: EncodeOptions
) -> Chunk:
    """A `RatedExample` of each answer that fits (`encoding.Task`)."""
    labels = (1.0, 0.0) if isinstance(row, PairRow) else (row.label,)
    made, total = [], Report()
    for example, one, label in zip(_answers(plans, encoded), encoded, labels, strict=True):
        shared = _before_answer(example)
        excess, report = _excess((example,), shared, one.lead, options)
        total += report
        if excess is not None:
            cut = _without(example, one.lead, excess)
            made.append(RatedExample(cut, shared - excess, label, row.source))
    return made, total


def plan_steps(
    row: StepsRow, tokenizer: Tokenizer, options: MaskOptions, separator: str
) -> list[Plan]:
    """The conversation up to where its answer begins, then each step and each separator."""
    answer = Turn({"role": "assistant", "content": SENTINEL})
    whole = Chat((*row.prompt.turns, answer), row.where, row.prompt.tools, row.prompt.separator)
    # All is trained on, so that no turn has to be located.
    plan = plan_row(whole, tokenizer, replace(options, train_on_prompt=True))
    *earlier, last = plan.pieces
    before, *after = last.text.split(SENTINEL)
    if len(after) != 1:
        raise UserError(
            f"{row.where}: the chat template does not write the answer as it stands, once; "
            "train without it"
        )
    steps = chain.from_iterable((Piece(step), Piece(separator)) for step in row.steps)
    return [Plan((*earlier, Piece(before), *steps), row.where, bos=plan.bos)]


def make_steps(
    separator: str,
    row: StepsRow,
    plans: list[Plan],
    encoded: list[Encoded],
    options: EncodeOptions,
) -> Chunk:
    """The `StepsExample` of a row, if it fits (`encoding.Task`)."""
    one = encoded[0]
    # Pieces: the prompt's, then a step and a separator in turn.
    first = len(one.ends) - 2 * len(row.steps)
    shared, ends = one.ends[first - 1], np.array(one.ends[first + 1 :: 2])
    if np.any(np.diff(ends, prepend=shared) == 0):
        raise UserError(f"{row.where}: a step with its separator {separator!r} has no token")
    weights = np.zeros(len(one.tokens), np.float32)
    weights[ends - 1] = 1.0
    labels = np.zeros(len(one.tokens), np.int32)
    labels[ends - 1] = row.labels
    example = Example(one.tokens, weights, row.where)
    excess, report = _excess((example,), shared, one.lead, options)
    if excess is None:
        return [], report
    kept = np.delete(labels, np.s_[one.lead : one.lead + excess])
    return [StepsExample(_without(example, one.lead, excess), kept, row.source)], report


def _answers(plans: list[Plan], encoded: list[Encoded]) -> list[Example]:
    """An example of each answer; UserError if two are the same."""
    examples = [trained_example(p, e) for p, e in zip(plans, encoded, strict=True)]
    if len(examples) == 2 and np.array_equal(examples[0].tokens, examples[1].tokens):
        where = plans[0].where
        raise UserError(f"{where}: chosen and rejected become the same tokens; leave the row out")
    return examples


def _before_answer(example: Example) -> int:
    """The tokens before the first that is trained on."""
    return int(np.argmax(example.weights > 0))


def _excess(
    sequences: Sequence[Example], shared: int, lead: int, options: EncodeOptions
) -> tuple[int | None, Report]:
    """How many tokens the start of the prompt must lose so that all sequences fit, or None where
    they are left out.

    `lead` tokens at the start stay, and at least one token stays before the answer, whose first
    token could not be predicted otherwise.
    """
    longest = max(example.size for example in sequences)
    excess = longest - options.max_seq_length
    if excess <= 0:
        return 0, Report()
    if options.on_long == "stop":
        raise too_long(sequences[0].where, longest, options.max_seq_length)
    if options.on_long == "skip":
        return None, Report(too_long=1)
    if shared - excess < max(lead, 1):
        return None, Report(answer_too_long=1)
    return excess, Report(prompt_cut=1)


def _without(example: Example, lead: int, excess: int) -> Example:
    """The example without `excess` tokens behind the first `lead`."""
    if not excess:
        return example
    lost = np.s_[lead : lead + excess]
    tokens, weights = np.delete(example.tokens, lost), np.delete(example.weights, lost)
    return Example(tokens, weights, example.where)
