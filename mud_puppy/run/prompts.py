"""The prompts that a run answers before and after training, chosen and judged before it starts."""

from itertools import islice
from typing import Any

from mud_puppy.config import Config
from mud_puppy.data import Chat
from mud_puppy.errors import UserError
from mud_puppy.model import Model
from mud_puppy.run.kinds import conversation
from mud_puppy.sampling.prompts import check, context_length, eos_ids, tokenize

Prompt = str | list[dict[str, Any]]


def choose_prompts(config: Config, model: Model, tokenizer: Any, rows: list[Any]) -> list[Prompt]:
    """The prompts named in the config, or what the first conversations ask that leave room.

    Raises UserError for a named prompt that does not fit into the model, and for whatever else
    `generate` would refuse after the model was loaded.
    """
    if config.sample_prompts == 0:
        return []
    eos_ids(model, tokenizer)
    room = context_length(model.arch) - config.sample_max_new_tokens
    if room < 1:
        raise UserError(
            f"sample_max_new_tokens {config.sample_max_new_tokens}: the model has "
            f"{context_length(model.arch)} positions, so no prompt would fit; lower it"
        )
    if not isinstance(config.sample_prompts, int):
        return _named(config, model, tokenizer, config.sample_prompts)
    templated = config.chat_template and bool(tokenizer.chat_template)
    chats = (conversation(row) for row in rows)
    asked = (_question(chat, templated) for chat in chats if chat is not None)
    # A question that is too long was cut for training; here another is asked instead.
    fitting = (q for q in asked if q and _fits(config, tokenizer, q, room))
    return list(islice(fitting, config.sample_prompts))


def uses_chat(config: Config) -> bool | None:
    """`generate`'s argument: the template where there is one, as in training."""
    return None if config.chat_template else False


def _named(config: Config, model: Model, tokenizer: Any, prompts: tuple[str, ...]) -> list[Prompt]:
    try:
        tokens = tokenize(tokenizer, prompts, uses_chat(config))
        check(model.arch, tokens, config.sample_max_new_tokens)
    except UserError as error:
        raise UserError(f"sample_prompts: {error}") from None
    return list(prompts)


def _fits(config: Config, tokenizer: Any, question: Prompt, room: int) -> bool:
    try:
        return len(tokenize(tokenizer, [question], uses_chat(config))[0]) <= room
    except UserError:  # a template that refuses it without its answer
        return False


def _question(row: Chat, templated: bool) -> Prompt:
    """The turns before the first answer; without a template, as the text that training joins."""
    turns = [turn.message for turn in row.turns]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    before = turns[: answers[0]] if answers else []
    if templated or not before:
        return before
    return row.separator.join(turn["content"] for turn in before) + row.separator
