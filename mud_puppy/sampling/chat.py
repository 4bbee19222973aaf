"""`chat`: a conversation on the terminal, replies shown while they are generated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.model.module import Model
from mud_puppy.sampling.batches import batches
from mud_puppy.sampling.choose import Options
from mud_puppy.sampling.generate import begin, detokenize, go_on, mesh_of
from mud_puppy.sampling.prompts import check, context_length, eos_ids, tokenize

Tree = Any

# Tokens of one device call: shown at once, small enough to read as a stream.
_CHUNK = 8
_INVALID = "\ufffd"


def chat(
    model: Model,
    params: Tree,
    tokenizer: Any,
    options: Options = Options(max_new_tokens=512, temperature=0.7),  # noqa: B008 (frozen)
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[..., Any] = print,
) -> list[dict[str, str]]:
    """Talks until `/exit` or the end of input, `/reset` starts over; returns the messages.

    `read(prompt)` gives the user's next line and `write(text, end=..., flush=...)` shows a text. A
    message that does not fit into the model's context is refused, and the conversation goes on.
    Raises UserError for a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("chat: the tokenizer has no chat template; use generate for plain text")
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := _next_line(read)) is not None:
        if line == "/reset":
            messages = list(opening)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                reply = _reply(model, params, tokenizer, asked, options, write)
            except UserError as error:
                write(f"{error}; /reset starts over")
                continue
            messages = [*asked, {"role": "assistant", "content": reply}]
    return messages


def _next_line(read: Callable[[str], str]) -> str | None:
    """None at `/exit`, end of input or Ctrl-C."""
    try:
        line = read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line == "/exit" else line


def _reply(
    model: Model,
    params: Tree,
    tokenizer: Any,
    messages: list[dict[str, str]],
    options: Options,
    write: Callable[..., Any],
) -> str:
    (prompt,) = tokenize(tokenizer, [messages], chat=True)
    room = context_length(model.arch) - len(prompt)
    # Another seed every turn, or "again, please" would draw the same numbers.
    options = replace(
        options,
        max_new_tokens=max(1, min(options.max_new_tokens, room)),
        seed=options.seed + len(messages),
    )
    eos = eos_ids(model, tokenizer)
    parts = []
    try:
        chunks = stream_tokens(model, params, prompt, options, eos)
        for text in stream_text(tokenizer, chunks, eos):
            parts.append(text)
            write(text, end="", flush=True)
    except KeyboardInterrupt:  # Ctrl-C cuts a reply short, the conversation goes on
        pass
    write("")
    return "".join(parts)


def stream_tokens(
    model: Model,
    params: Tree,
    prompt: Sequence[int],
    options: Options = Options(),  # noqa: B008 (frozen)
    eos: Sequence[int] = (),
) -> Iterator[list[int]]:
    """The tokens `generate_tokens` gives for this one prompt, a few at a time."""
    check(model.arch, [prompt], options.max_new_tokens)
    mesh = mesh_of(params)
    (batch,) = batches([prompt], 1, mesh.size if mesh else 1)
    row = int(np.argmax(batch.rows))
    state, shown, most = None, 0, options.max_new_tokens
    while state is None or (shown < most and not np.all(state.ended)):
        limit = min(shown + _CHUNK, most)
        if state is None:
            state = begin(model, params, batch, mesh, options, eos, limit)
        else:
            state = go_on(model, params, state, options, eos, limit)
        count = int(state.count)
        yield np.asarray(state.tokens)[row, shown:count].tolist()
        shown = count


def stream_text(
    tokenizer: Any, chunks: Iterable[Sequence[int]], eos: Sequence[int] = ()
) -> Iterator[str]:
    """The growing text in pieces that never end inside of a UTF-8 character."""
    tokens: list[int] = []
    shown = 0
    for chunk in chunks:
        tokens += chunk
        # An unfinished character decodes to replacement marks at the end: keep it back.
        text = detokenize(tokenizer, tokens, eos).rstrip(_INVALID)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    if rest := detokenize(tokenizer, tokens, eos)[shown:]:
        yield rest
