"""From what a caller asks to token ids, and which token ids end a reply.

A tokenizer here is a transformers tokenizer, or anything with its methods.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch
from mud_puppy.model.module import Model

Prompt = str | Sequence[Mapping[str, Any]]

_MARK = "mud"


def tokenize(
    tokenizer: Any, prompts: Sequence[Prompt], chat: bool | None = None
) -> list[list[int]]:
    """Token ids of each prompt, a text or a list of chat messages.

    chat: a text becomes one user message of the tokenizer's chat template (True), is continued as
    it stands (False), or the former where the tokenizer has a template (None).
    """
    if isinstance(prompts, str):
        raise UserError("prompts is one text, expected a list of prompts: put it in brackets")
    templated = bool(tokenizer.chat_template)
    if chat and not templated:
        raise UserError("chat is on, but the tokenizer has no chat template; use chat off")
    chat = templated if chat is None else chat
    return [_tokenize(tokenizer, prompt, chat, f"prompt {i}") for i, prompt in enumerate(prompts)]


def _tokenize(tokenizer: Any, prompt: Prompt, chat: bool, where: str) -> list[int]:
    if not prompt:
        raise UserError(f"{where} is empty, expected a text or a list of messages")
    if not chat:
        if not isinstance(prompt, str):
            why = "chat is off" if tokenizer.chat_template else "the tokenizer has no chat template"
            raise UserError(f"{where} is a list of messages, but {why}; give a text")
        ids = tokenizer(prompt)["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = _render(tokenizer, messages, where)
    if not ids:
        raise UserError(f"{where} has no tokens: {prompt!r:.80}")
    return list(ids)


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    for m, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(
                f"{where}, message {m}: expected 'role' and 'content', got {message!r:.80}"
            )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the chat template refused the messages: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def eos_ids(model: Model, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends a reply, sorted.

    Those of the model's generation_config.json, or of its config where that names none; the
    tokenizer's; and the token with which the chat template ends an assistant's turn, because that
    is the one a fine-tuned model has learned (a base model's own EOS is often another).
    """
    ids = _generation_config(model).get("eos_token_id")
    if ids is None:
        ids = json.loads(model.arch.config).get("eos_token_id")
    found = set(ids) if isinstance(ids, list) else {ids}
    found |= {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return tuple(sorted(found - {None}))


def _generation_config(model: Model) -> dict[str, Any]:
    path = Path(model.source or "") / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}); repair or delete it") from None


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token right behind an assistant's words in the chat template."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:  # a template that wants more than two plain turns
        return None
    tail = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    return tail[0] if tail and tail[0] in tokenizer.added_tokens_decoder else None


def check(arch: Arch, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """UserError for token ids the model does not have, and prompts that leave no room to answer."""
    most = context_length(arch)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty, expected at least one token")
        worst = max(prompt) if min(prompt) >= 0 else min(prompt)
        if not 0 <= worst < arch.vocab_size:
            raise UserError(
                f"prompt {i} has token id {worst}, the model's vocabulary has "
                f"{arch.vocab_size}: is this the model's own tokenizer?"
            )
        if len(prompt) + max_new_tokens > most:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is more "
                f"than the {most} positions of the model: shorten it or lower max_new_tokens"
            )


def context_length(arch: Arch) -> int:
    """Positions the model is made for: `max_positions`, stretched where the config stretches rope.

    linear, dynamic and yarn configs commonly keep the length before the stretch in
    max_position_embeddings.
    """
    rope = json.loads(arch.config).get("rope_parameters") or {}
    if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return arch.max_positions
    old = rope.get("original_max_position_embeddings") or arch.max_positions
    return max(arch.max_positions, int(old * (rope.get("factor") or 1)))
