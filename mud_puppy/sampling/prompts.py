"""From what a caller asks to token ids, and which token ids end a reply.

Chat is rendered by the data room's `Template`, so that a model is asked in the words it was trained
on. A tokenizer here is a transformers tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mud_puppy.data.template import SENTINEL, Template, template_of
from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch
from mud_puppy.model.files import find_model, looks_local, read_json
from mud_puppy.model.module import Model

Prompt = str | Sequence[Mapping[str, Any]]


def tokenize(
    tokenizer: Any, prompts: Sequence[Prompt], chat: bool | None = None
) -> list[list[int]]:
    """Token ids of each prompt, a text or a list of chat messages.

    chat: a text becomes one user message of the tokenizer's chat template (True), is continued as
    it stands (False), or the former where the tokenizer has a template (None).
    """
    if isinstance(prompts, str):
        raise UserError("prompts is one text, expected a list of prompts: put it in brackets")
    template = None if chat is False else template_of(tokenizer)
    if chat and template is None:
        raise UserError("chat is on, but the tokenizer has no chat template; use chat off")
    return [_ids(tokenizer, template, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]


def _ids(tokenizer: Any, template: Template | None, prompt: Prompt, where: str) -> list[int]:
    if not prompt:
        raise UserError(f"{where} is empty, expected a text or a list of messages")
    if template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = _render(template, messages, where)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt, str):
        ids = _unended(tokenizer, prompt)
    else:
        why = "chat is off" if tokenizer.chat_template else "the tokenizer has no chat template"
        raise UserError(f"{where} is a list of messages, but {why}; give a text")
    if not ids:
        raise UserError(f"{where} has no tokens: {prompt!r:.80}")
    return list(ids)


def _unended(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text to continue: without the EOS that some tokenizers put behind every text."""
    ids = tokenizer(text)["input_ids"]
    eos = tokenizer.eos_token_id
    ended = eos is not None and ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ended else ids


def _render(template: Template, messages: Sequence[Mapping[str, Any]], where: str) -> str:
    for m, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(
                f"{where}, message {m}: expected 'role' and 'content', got {message!r:.80}"
            )
    try:
        return template.render([dict(message) for message in messages], generation_prompt=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
    if not all(i is None or (isinstance(i, int) and i < 2**31) for i in found):
        raise UserError(f"{model.source}: eos_token_id {ids!r} is no token id, nor a list of them")
    found |= {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return tuple(sorted(found - {None}))


def _generation_config(model: Model) -> dict[str, Any]:
    if model.source is None:
        return {}
    folder = Path(model.source).expanduser()
    if not folder.exists() and not looks_local(model.source):
        folder = find_model(model.source, weights=False)  # a hub id: the copy it was loaded from
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token right behind an assistant's words in the chat template."""
    template = template_of(tokenizer)
    if template is None:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
    try:
        text = template.render(turns)
    except UserError:  # a template that wants more than two plain turns
        return None
    tail = tokenizer(text.rpartition(SENTINEL)[2], add_special_tokens=False)["input_ids"]
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
