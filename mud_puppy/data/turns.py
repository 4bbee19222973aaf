"""Which characters of a rendered conversation are a given turn.

A turn is what the model would have to write after the generation prompt, its end-of-turn token
included. Three ways to find it, tried in order, each checked against the whole rendering:

1. the template's own {% generation %} marks, completed by the end-of-turn text that follows them;
2. the rendering of the conversation up to the turn: the prompt for it and the prompt with it are
   both prefixes;
3. the rendering with the turn's content replaced by a sentinel: what stands before and after it
   must be the beginning and the end of the whole. This serves templates that rewrite earlier turns
   (Qwen3, some Mistral).

None is taken on trust: a turn that no way locates is None, and the caller stops.
"""

from typing import NamedTuple

from mud_puppy.data.template import SENTINEL, Marks, Messages, Template
from mud_puppy.errors import UserError


class Span(NamedTuple):
    """Characters of a text: a turn's own, [start, content), and its closing text, [content, close).

    The closing may end inside a token, which is then not the turn's. `trim`: white space at the end
    is not trained.
    """

    start: int
    content: int
    close: int
    trim: bool = True


def spans_of(
    template: Template, messages: Messages, wanted: list[int]
) -> tuple[str, list[Span | None]]:
    """The rendered text, and for each wanted message its Span, or None if it cannot be located."""
    marks: Marks = []
    if template.has_marks and any(messages[i]["role"] == "assistant" for i in wanted):
        text, marks = template.render_marked(messages)
    else:
        text = template.render(messages)
    marked = _marked(template, messages, text, marks) if marks else {}
    return text, [marked.get(i) or _located(template, messages, i, text) for i in wanted]


def _located(template: Template, messages: Messages, i: int, text: str) -> Span | None:
    span = None
    if messages[i]["role"] == "assistant" and template.prompts and i > 0:
        span = _by_prefix(template, messages, i, text)
    return span or _by_sentinel(template, messages, i, text)


def _marked(template: Template, messages: Messages, text: str, marks: Marks) -> dict[int, Span]:
    """Span of each assistant message from the marks; empty when they do not fit the messages one by
    one."""
    spans: dict[int, Span] = {}
    seen = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto, upto_marks = _marked_upto(template, messages, i, (text, marks))
        own = marks[seen : len(upto_marks)]
        if len(own) != 1 or not text[slice(*own[0])].strip():
            return {}
        seen += 1
        start, end = own[0]
        close = end + _common(upto[upto_marks[-1][1] :], text[end:])
        spans[i] = Span(start, end, close)
    return spans if seen == len(marks) else {}


def _marked_upto(
    template: Template, messages: Messages, i: int, whole: tuple[str, Marks]
) -> tuple[str, Marks]:
    return whole if i == len(messages) - 1 else template.render_marked(messages[: i + 1])


def _by_prefix(template: Template, messages: Messages, i: int, text: str) -> Span | None:
    prompt = _tried(template, messages[:i], generation_prompt=True)
    if prompt is None or not text.startswith(prompt):
        return None
    turn = text if i == len(messages) - 1 else _tried(template, messages[: i + 1])
    if turn is None or not text.startswith(turn) or not turn.startswith(prompt):
        return None
    return Span(len(prompt), len(turn), len(turn))


def _by_sentinel(template: Template, messages: Messages, i: int, text: str) -> Span | None:
    blank = {"role": messages[i]["role"], "content": SENTINEL}
    before, after = _around(_tried(template, [*messages[:i], blank, *messages[i + 1 :]]))
    if before is None or after is None or SENTINEL in text:
        return None
    start, end = len(before), len(text) - len(after)
    if not text.startswith(before) or not text.endswith(after) or end < start:
        return None
    if i == len(messages) - 1:
        return Span(start, end, len(text))
    _, closing = _around(_tried(template, [*messages[:i], blank]))
    if closing is None:
        return None
    return Span(start, end, end + _common(closing, text[end:]))


def _around(text: str | None) -> tuple[str | None, str | None]:
    """What stands before and after the sentinel, if it stands in the text exactly once."""
    if text is None or text.count(SENTINEL) != 1:
        return None, None
    before, _, after = text.partition(SENTINEL)
    return before, after


def _tried(template: Template, messages: Messages, generation_prompt: bool = False) -> str | None:
    """The rendering, or None where the template refuses a conversation that we made up."""
    try:
        return template.render(messages, generation_prompt)
    except UserError:
        return None


def _common(a: str, b: str) -> int:
    """The length of the longest common prefix."""
    differ = (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
