"""Examples as text in which one sees what is trained on, or read.

Marked are the tokens that carry weight. Of a pair the prompt stands once, before both answers; of
steps each end stands with its label.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mud_puppy.data.example import (
    AnyExample,
    Example,
    PairExample,
    RatedExample,
    StepsExample,
    TaughtExample,
)
from mud_puppy.data.preference_batches import last_token
from mud_puppy.data.template import Tokenizer

MARKED, RESET = "\x1b[30;42m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"
BREAK = "⏎"  # a marked line break would not be seen


def preview_text(
    examples: Sequence[AnyExample],
    tokenizer: Tokenizer,
    count: int,
    color: bool = True,
    word: str = "trained",
) -> str:
    """The first `count` examples decoded, marked tokens on green, or between ⟦ ⟧ without `color`.

    Each is headed by its file and line, its tokens in a row, how many of them are marked (`word`
    says what marks are), and by label, margin and source, where it has them.
    """
    return "\n".join(_example(example, tokenizer, color, word) for example in examples[:count])


def rewarded(example: PairExample | RatedExample, pad_token_id: int | None) -> Any:
    """The example with the tokens marked at which rewards are read (`data.collate_pairs`)."""

    def at_end(one: Example) -> Example:
        weights = np.zeros_like(one.weights)
        weights[last_token(one.tokens, pad_token_id)] = 1.0
        return replace(one, weights=weights)

    if isinstance(example, RatedExample):
        return replace(example, example=at_end(example.example))
    return replace(example, chosen=at_end(example.chosen), rejected=at_end(example.rejected))


def with_prompt(pair: PairExample) -> PairExample:
    """The pair as train_on_prompt has it: all of the chosen sequence is learned."""
    weights = np.ones_like(pair.chosen.weights)
    weights[0] = 0.0
    return replace(pair, chosen=replace(pair.chosen, weights=weights))


def runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(decoded text, trained) of each run of tokens with the same mark."""
    return _runs(example, tokenizer, 0, example.size)


def _runs(example: Example, tokenizer: Tokenizer, start: int, stop: int) -> list[tuple[str, bool]]:
    marked = example.weights[start:stop] > 0
    edges = [start, *(np.flatnonzero(np.diff(marked)) + start + 1).tolist(), stop]
    ids = example.tokens.tolist()
    # Decoded up to each edge: a sentencepiece decoder drops the space before the first word it is
    # given.
    upto = [
        tokenizer.decode(ids[:edge], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for edge in edges
    ]
    return [
        (upto[k + 1][len(upto[k]) :], bool(marked[edges[k] - start]))
        for k in range(len(edges) - 1)
        if edges[k] < stop
    ]


def _example(example: AnyExample, tokenizer: Tokenizer, color: bool, word: str) -> str:
    match example:
        case PairExample():
            head, body = _pair(example, tokenizer, color, word)
        case StepsExample():
            head, body = _steps(example, tokenizer, color)
        case RatedExample():
            head = f"{_counts(example, word)}, label {example.label:g}{_source(example.source)}"
            body = _text(example.example, tokenizer, color)
        case TaughtExample():
            return _example(example.example, tokenizer, color, word)
        case _:
            head, body = _counts(example, word), _text(example, tokenizer, color)
    return f"{example.where}  {head}\n{body}\n"


def _counts(example: AnyExample, word: str) -> str:
    total, marked = example.size, example.trained
    return f"{total} tokens, {marked} {word} ({100 * marked / total:.0f} %)"


def _source(source: str) -> str:
    return f", source {_shown(source)}" if source else ""


def _pair(pair: PairExample, tokenizer: Tokenizer, color: bool, word: str) -> tuple[str, str]:
    # One token that both begin with (a BOS) is no prompt.
    shared, lines = (pair.shared if pair.shared > 1 else 0), []
    parts = [("prompt", pair.chosen, 0, shared)] if shared else []
    answers = (("chosen", pair.chosen), ("rejected", pair.rejected))
    parts += [(name, one, shared, one.size) for name, one in answers]
    for name, one, start, stop in parts:
        marked = np.count_nonzero(one.weights[start:stop])
        lines.append(f"--- {name}: {stop - start} tokens, {marked} {word}")
        lines.append(_text(one, tokenizer, color, start, stop).removesuffix("\n"))
    margin = f", margin {pair.margin:g}" if pair.margin else ""
    return f"{_counts(pair, word)}{margin}{_source(pair.source)}", "\n".join(lines)


def _steps(steps: StepsExample, tokenizer: Tokenizer, color: bool) -> tuple[str, str]:
    one, start, lines = steps.example, 0, []
    ends = np.flatnonzero(one.weights).tolist()
    for number, end in enumerate(ends, start=1):
        [(text, _)] = _runs(one, tokenizer, end, end + 1)
        label = "right" if steps.labels[end] else "wrong"
        read = f"{_marked(text, True, color)} step {number}: {label}"
        lines.append(_text(one, tokenizer, color, start, end) + read)
        start = end + 1
    right = int(steps.labels.sum())
    head = f"{one.size} tokens, {len(ends)} steps ({right} right){_source(steps.source)}"
    return head, "\n".join(lines)


def _text(
    one: Example, tokenizer: Tokenizer, color: bool, start: int = 0, stop: int | None = None
) -> str:
    found = _runs(one, tokenizer, start, one.size if stop is None else stop)
    return "".join(_marked(text, on, color) for text, on in found)


def _marked(text: str, on: bool, color: bool) -> str:
    shown = _shown(text)
    if not on:
        return shown
    if not shown.strip("\n"):
        shown = BREAK * len(shown)
    if not color:
        return f"{OPEN}{shown}{CLOSE}"
    # Line by line, for pagers that reset colours at a line's end.
    return "\n".join(f"{MARKED}{line}{RESET}" if line else "" for line in shown.split("\n"))


def _shown(text: str) -> str:
    """Control characters as pictures or codes: data must not steer the terminal."""
    return "".join(
        letter if letter in "\n\t" or letter.isprintable() else _visible(letter) for letter in text
    )


def _visible(letter: str) -> str:
    code = ord(letter)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
