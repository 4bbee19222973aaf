"""What a row of preferences, ratings or rated steps may look like.

Each `convert_*` is a converter for `read_rows`: (one parsed line, where) -> (row, names of the
columns that were not used). The columns are those of TRL's data sets; what stands beside them is
not used, and named. Texts become a question and an answer, as in the supervised formats.
"""

from dataclasses import dataclass
from typing import Any

from mud_puppy.data.fields import (
    Columns,
    Turn,
    as_columns,
    as_number,
    as_text,
    as_tools,
    as_truth,
    as_turns,
    kind_of,
    listed,
)
from mud_puppy.data.formats import Chat, Row, Text, completed
from mud_puppy.data.pairs import paired
from mud_puppy.errors import UserError

Unused = frozenset[str]


@dataclass(frozen=True)
class PairRow:
    """Two answers to one prompt, as two conversations of which only the answers are trained on.

    margin: by how much the chosen one is better, in units of the reward (0: not said).
    """

    chosen: Row
    rejected: Row
    margin: float = 0.0
    source: str = ""

    @property
    def where(self) -> str:
        """File and line."""
        return self.chosen.where


@dataclass(frozen=True)
class RatedRow:
    """An answer with a label: 1.0 or 0.0 (wanted or not), or a score."""

    answered: Row
    label: float
    source: str = ""

    @property
    def where(self) -> str:
        """File and line."""
        return self.answered.where


@dataclass(frozen=True)
class StepsRow:
    """A prompt (the conversation before the answer), the answer's steps, and whether each is
    right."""

    prompt: Chat
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    source: str = ""

    @property
    def where(self) -> str:
        """File and line."""
        return self.prompt.where


def convert_pair(
    value: object, where: str, whole_texts: bool = False, margins: bool = True
) -> tuple[PairRow, Unused]:
    """`chosen` and `rejected` with or without `prompt` (`pairs.paired`), `margin`, `source`,
    `tools`.

    whole_texts: two texts without a prompt are taken as they stand (a reward model can read them,
    a preference loss cannot). margins: whether the margin is used. Raises UserError for a row of
    another form, and for equal answers.
    """
    row = as_columns(value, where)
    _need(row, (("chosen",), ("rejected",)), where)
    chosen, rejected = paired(row, where, whole_texts)
    used, margin = {"prompt", "chosen", "rejected", "source", "tools"}, 0.0
    if margins:
        used |= {"margin"}
        # An empty cell of a CSV file is no margin.
        margin = 0.0 if row.get("margin", "") == "" else as_number(row["margin"], "margin", where)
    return PairRow(chosen, rejected, margin, _source(row, where)), frozenset(row.keys() - used)


def convert_unpaired(value: object, where: str) -> tuple[RatedRow | PairRow, Unused]:
    """`prompt` + `completion`, or `messages`, with a `label` (true or false, 1 or 0); a row of
    `chosen` and `rejected` stays a pair, which encoding takes as two answers."""
    row = as_columns(value, where)
    if row.keys() >= {"chosen", "rejected"}:
        return convert_pair(value, where, margins=False)
    _need(row, (("prompt", "messages"), ("completion", "messages"), ("label",)), where)
    answered = _answered(row, where)
    label = float(as_truth(row["label"], "label", where))
    return RatedRow(answered, label, _source(row, where)), _unused(row)


def convert_scored(value: object, where: str) -> tuple[RatedRow, Unused]:
    """`prompt` + `completion`, `messages` or `text`, with a `label` that is any finite number."""
    row = as_columns(value, where)
    forms = (("prompt", "messages", "text"), ("completion", "messages", "text"), ("label",))
    _need(row, forms, where)
    if row.keys() & {"completion", "messages"}:
        answered = _answered(row, where)
    else:
        text = as_text(row.get("text"), "text", where)
        if not text.strip():
            raise UserError(f"{where}: text is empty")
        answered = Text(text, where)
    label = as_number(row["label"], "label", where)
    return RatedRow(answered, label, _source(row, where)), _unused(row)


def convert_steps(value: object, where: str) -> tuple[StepsRow, Unused]:
    """`prompt` (text or messages), `completions` or `steps` (a list of texts), and `labels` (true
    or false, 1 or 0), one for each step."""
    row = as_columns(value, where)
    _need(row, (("prompt",), ("completions", "steps"), ("labels",)), where)
    name = "completions" if "completions" in row else "steps"
    steps = [as_text(s, f"{name}[{i}]", where) for i, s in enumerate(_list(row, name, where))]
    labels = [as_truth(x, f"labels[{i}]", where) for i, x in enumerate(_list(row, "labels", where))]
    if len(steps) != len(labels):
        raise UserError(f"{where}: {len(steps)} {name} but {len(labels)} labels; each step has one")
    for i, step in enumerate(steps):
        if not step.strip():
            raise UserError(f"{where}: {name}[{i}] is empty; leave it and its label out")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        asked = Turn({"role": "user", "content": as_text(prompt, "prompt", where)})
        chat = Chat((asked,), where, separator="")
    else:
        chat = Chat(as_turns(prompt, f"{where}: prompt"), where, as_tools(row, where))
    used = {"prompt", name, "labels", "source", "tools"}
    row_of_steps = StepsRow(chat, tuple(steps), tuple(labels), _source(row, where))
    return row_of_steps, frozenset(row.keys() - used)


def _answered(row: Columns, where: str) -> Chat:
    """A conversation in which only the answer is trained on: the completion, or the last
    message."""
    if "messages" not in row:
        return _answer_alone(completed(row, where), row, where)
    turns = as_turns(row["messages"], f"{where}: messages")
    if turns[-1].role != "assistant":
        raise UserError(
            f"{where}: messages must end with the assistant's message that has the label, "
            f"not with one of role {turns[-1].role}"
        )
    asked = tuple(Turn(turn.message, train=False) for turn in turns[:-1])
    return Chat((*asked, turns[-1]), where, as_tools(row, where))


def _answer_alone(chat: Chat, row: Columns, where: str) -> Chat:
    """The chat; UserError where its completion begins with messages that are the prompt's."""
    first = 1 if isinstance(row["prompt"], str) else len(row["prompt"])
    if (role := chat.turns[first].role) != "assistant":
        raise UserError(
            f"{where}: completion begins with the role {role}; it must be the assistant's answer "
            "alone, without the messages of the prompt"
        )
    return chat


def _need(row: Columns, needs: tuple[tuple[str, ...], ...], where: str) -> None:
    """Raises UserError unless the row has one column of each of `needs`."""
    missing = [names for names in needs if not row.keys() & set(names)]
    if missing:
        wanted = " and ".join(" or ".join(names) for names in needs)
        lost = " or ".join(missing[0])
        raise UserError(
            f"{where}: needs {wanted}, but has no {lost}: its columns are {listed(row)}"
        )


def _list(row: Columns, name: str, where: str) -> list[Any]:
    if not isinstance(row[name], list) or not row[name]:
        what = "an empty list" if row[name] == [] else kind_of(row[name])
        raise UserError(f"{where}: {name} must be a list with at least one element, not {what}")
    return row[name]


def _source(row: Columns, where: str) -> str:
    return as_text(row.get("source", ""), "source", where)


def _unused(row: Columns) -> Unused:
    """Columns that a rated row did not use."""
    if "messages" in row:
        used = {"messages"}
    else:
        used = {"prompt", "completion"} if "completion" in row else {"text"}
    return frozenset(row.keys() - used - {"label", "source", "tools"})
