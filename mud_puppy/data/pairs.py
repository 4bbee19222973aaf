"""Two answers to one prompt: where the prompt ends.

It is given (`prompt`), or it is what two conversations have in common, whole messages only. Of two
texts without a prompt only dialogues in the form of Anthropic's HH data ("\\n\\nHuman: ...
\\n\\nAssistant: ...") can be told apart: the letters that two texts both begin with may be the
answers', so they are never taken for the prompt.
"""

import re

from mud_puppy.data.fields import Columns, Turn, as_text, as_tools, as_turns, kind_of
from mud_puppy.data.formats import Chat, Row, Text, exchange
from mud_puppy.errors import UserError

MARK = re.compile(r"(\n\n(?:Human|Assistant): ?)")
Turns = tuple[Turn, ...]


def paired(row: Columns, where: str, whole_texts: bool = False) -> tuple[Row, Row]:
    """The two conversations of a row with `chosen` and `rejected`, equal up to the answers.

    chosen, rejected: both texts, or both messages; these hold the answers alone, or the prompt
    before them. prompt: text or messages, or none. whole_texts: two texts without a prompt that
    are no dialogues are taken whole. Raises UserError where the prompt cannot be told, and where
    both answers are the same.
    """
    answers = row["chosen"], row["rejected"]
    if answers[0] == answers[1]:
        raise UserError(f"{where}: chosen and rejected are the same; leave the row out")
    if all(isinstance(answer, list) for answer in answers):
        return _of_messages(row, where)
    if all(isinstance(answer, str) for answer in answers):
        return _of_texts(row, where, whole_texts)
    kinds = f"{kind_of(answers[0])} and {kind_of(answers[1])}"
    raise UserError(f"{where}: chosen and rejected must both be text or both messages, not {kinds}")


def _of_texts(row: Columns, where: str, whole: bool) -> tuple[Row, Row]:
    chosen, rejected = (as_text(row[name], name, where) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return (
            exchange(prompt, chosen, where, ("prompt", "chosen"), separator=""),
            exchange(prompt, rejected, where, ("prompt", "rejected"), separator=""),
        )
    if prompt is not None:
        what = f"chosen and rejected are text, so prompt must be text, not {kind_of(prompt)}"
        raise UserError(f"{where}: {what}")
    dialogues = _dialogue(chosen), _dialogue(rejected)
    if all(dialogues):
        return _without_prompt(*dialogues, where, separator="")
    if whole:
        return Text(chosen, where), Text(rejected, where)
    raise UserError(
        f"{where}: chosen and rejected are texts without a prompt, and nothing tells where it "
        "ends; add a column prompt, or give messages"
    )


def _of_messages(row: Columns, where: str) -> tuple[Chat, Chat]:
    prompt, tools = row.get("prompt"), as_tools(row, where)
    chosen = as_turns(row["chosen"], f"{where}: chosen")
    rejected = as_turns(row["rejected"], f"{where}: rejected")
    if prompt is None:
        return _without_prompt(chosen, rejected, where, tools=tools)
    if not isinstance(prompt, str):
        asked = as_turns(prompt, f"{where}: prompt")
    elif chosen[0].role == rejected[0].role == "assistant":
        asked = (Turn({"role": "user", "content": as_text(prompt, "prompt", where)}),)
    else:  # as in UltraFeedback: the question once more, beside the conversations that hold it
        shared = chosen[: _common(chosen, rejected)]
        if prompt.strip() not in [turn.content.strip() for turn in shared]:
            raise UserError(
                f"{where}: prompt is none of the messages that chosen and rejected both begin "
                "with; leave it out, or give messages of the assistant alone as chosen and rejected"
            )
        return _without_prompt(chosen, rejected, where, tools=tools)
    told = [turn.message for turn in asked]
    if all([t.message for t in turns[: len(told)]] == told for turns in (chosen, rejected)):
        chosen, rejected = chosen[len(told) :], rejected[len(told) :]
    _check_answers(chosen, rejected, where)
    return _chats(asked, chosen, rejected, Chat((), where, tools))


def _without_prompt(
    chosen: Turns, rejected: Turns, where: str, separator: str = "\n", tools: list | None = None
) -> tuple[Chat, Chat]:
    """Conversations whose common beginning is the prompt."""
    count = _common(chosen, rejected)
    if count == 0:
        raise UserError(
            f"{where}: chosen and rejected begin with different messages, so they have no prompt "
            "in common; add a column prompt"
        )
    _check_answers(chosen[count:], rejected[count:], where)
    bare = Chat((), where, tools, separator)
    return _chats(chosen[:count], chosen[count:], rejected[count:], bare)


def _check_answers(chosen: Turns, rejected: Turns, where: str) -> None:
    """Raises UserError unless both go on, with the assistant, after the common messages."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise UserError(
                f"{where}: {name} has no answer: it ends with the messages that both begin with"
            )
        if turns[0].role != "assistant":
            raise UserError(
                f"{where}: after the prompt, {name} goes on with the role {turns[0].role}; only "
                "answers of the assistant can be compared"
            )


def _chats(asked: Turns, chosen: Turns, rejected: Turns, bare: Chat) -> tuple[Chat, Chat]:
    history = tuple(Turn(turn.message, False, turn.mark) for turn in asked)
    made = (
        Chat((*history, *turns), bare.where, bare.tools, bare.separator)
        for turns in (chosen, rejected)
    )
    return next(made), next(made)


def _common(chosen: Turns, rejected: Turns) -> int:
    """How many messages both begin with."""
    same = [a.message == b.message for a, b in zip(chosen, rejected, strict=False)]
    return (*same, False).index(False)


def _dialogue(text: str) -> Turns:
    """The turns of a text in the form of the HH data; empty if it is not one."""
    before, *parts = MARK.split("\n\n" + text.lstrip("\n"))
    if before or not parts or not parts[0].startswith("\n\nHuman:"):
        return ()
    roles = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
    return tuple(
        Turn({"role": roles[mark.rstrip(" ")], "content": content}, mark=mark)
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    )
