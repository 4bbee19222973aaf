"""Examples as text in which one sees what is trained on."""

from collections.abc import Sequence

import numpy as np

from mud_puppy.data.example import Example
from mud_puppy.data.template import Tokenizer

TRAINED, RESET = "\x1b[30;42m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"


def preview_text(
    examples: Sequence[Example], tokenizer: Tokenizer, count: int, color: bool = True
) -> str:
    """The first `count` examples decoded, trained tokens on green, or between ⟦ ⟧ without `color`.

    Each is headed by its file and line, its tokens, and how many of them are trained.
    """
    return "\n".join(_example(example, tokenizer, color) for example in examples[:count])


def _example(example: Example, tokenizer: Tokenizer, color: bool) -> str:
    total, trained = len(example.tokens), example.trained
    head = f"{example.where}  {total} tokens, {trained} trained ({100 * trained / total:.0f} %)"
    body = "".join(_marked(text, on, color) for text, on in runs(example, tokenizer))
    return f"{head}\n{body}\n"


def runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(decoded text, trained) of each run of tokens with the same mark."""
    trained = example.weights > 0
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    ids = example.tokens.tolist()
    # Decoded up to each edge: a sentencepiece decoder drops the space before the first word it is
    # given.
    upto = [
        tokenizer.decode(ids[:edge], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for edge in edges
    ]
    return [(upto[k + 1][len(upto[k]) :], bool(trained[edges[k]])) for k in range(len(edges) - 1)]


def _marked(text: str, trained: bool, color: bool) -> str:
    shown = "".join(
        letter if letter in "\n\t" or letter.isprintable() else _visible(letter) for letter in text
    )
    if not trained:
        return shown
    if not color:
        return f"{OPEN}{shown}{CLOSE}"
    # Line by line, for pagers that reset colours at a line's end.
    return "\n".join(f"{TRAINED}{line}{RESET}" if line else "" for line in shown.split("\n"))


def _visible(letter: str) -> str:
    """A control character as its picture or code: data must not steer the terminal."""
    code = ord(letter)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
