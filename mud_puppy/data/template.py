"""A tokenizer's chat template as a pure function from messages to text.

Renders through transformers' own Jinja sandbox, with the special tokens the tokenizer gives to its
template, so the text is the one that `apply_chat_template` makes. Which characters of it are
trained on is `turns.py`.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mud_puppy.data.fields import Columns
from mud_puppy.errors import UserError

# A fast tokenizer of transformers; Any, so that importing this room does not import transformers.
Tokenizer = Any
Messages = list[Columns]
Marks = list[tuple[int, int]]

# Private-use characters: no text holds them, no template trims them.
SENTINEL = "\ue0f1mud-puppy\ue0f2"
GENERATION = re.compile(r"{%-?\+?\s*generation\s*[-+]?%}")


@dataclass(frozen=True)
class Template:
    """One template text, the special tokens it may name, and the tools of the conversation."""

    source: str
    special: tuple[tuple[str, Any], ...]
    tools: tuple[Any, ...] | None = None

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        """The text of `messages`; raises UserError with the template's complaint when it refuses
        them."""
        return self._render(messages, generation_prompt, marks=False)[0]

    def render_marked(self, messages: Messages) -> tuple[str, Marks]:
        """The text and the character ranges that the template marks as the assistant's."""
        return self._render(messages, generation_prompt=False, marks=True)

    @property
    def has_marks(self) -> bool:
        """Whether the template holds {% generation %} blocks."""
        return GENERATION.search(self.source) is not None

    @property
    def prompts(self) -> bool:
        """Whether text rendered for a reply ends where the reply begins.

        True when the template obeys add_generation_prompt, or writes no header before an assistant
        turn (Mistral). Tried on a conversation of two words.
        """
        return _prompts(replace(self, tools=None))

    def _render(
        self, messages: Messages, generation_prompt: bool, marks: bool
    ) -> tuple[str, Marks]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, ranges = render_jinja_template(
                [messages],
                tools=None if self.tools is None else list(self.tools),
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **dict(self.special),
            )
        except Exception as error:  # a template fails in whatever way its author left open
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the chat template refuses the conversation: {what}") from error
        return texts[0], [(int(start), int(end)) for start, end in ranges[0]] if marks else []


@lru_cache(maxsize=64)
def _prompts(template: Template) -> bool:
    asked: Messages = [{"role": "user", "content": "a"}]
    answered: Messages = [*asked, {"role": "assistant", "content": SENTINEL}]
    try:
        history, turn = template.render(asked), template.render(answered)
        if template.render(asked, generation_prompt=True) != history:
            return True
    except UserError:
        return False
    header, found, _ = turn.removeprefix(history).partition(SENTINEL)
    return bool(found) and turn.startswith(history) and not header.strip()


def template_of(tokenizer: Tokenizer, tools: list[Any] | None = None) -> Template | None:
    """The tokenizer's template for a conversation with these tools, or None when it has no
    template."""
    if not tokenizer.chat_template:
        return None
    try:
        source = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        what = str(error).splitlines()[0]
        raise UserError(f"the tokenizer has several chat templates: {what}") from error
    tokens = tokenizer.special_tokens_map.items()
    special = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in tokens)
    return Template(source, special, None if tools is None else tuple(tools))
