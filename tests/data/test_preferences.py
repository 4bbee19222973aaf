"""Rows of preferences, ratings and steps: every accepted form, and one line for each bad row."""

import pytest

from mud_puppy.data.formats import Chat, Text
from mud_puppy.data.preferences import (
    PairRow,
    RatedRow,
    convert_pair,
    convert_scored,
    convert_steps,
    convert_unpaired,
)
from mud_puppy.data.report import SKIP_HINT
from mud_puppy.data.rows import read_rows
from mud_puppy.errors import UserError


def user(content):
    return {"role": "user", "content": content}


def says(content):
    return {"role": "assistant", "content": content}


def told(chat):
    return [(turn.role, turn.content, turn.train) for turn in chat.turns]


Q, GOOD, BAD = user("What is two plus two?"), says("It is four."), says("It is five.")
HISTORY = [user("Hello there!"), says("How are you?"), Q]
ASKED = ("user", Q["content"], False)

PAIRS = {
    "texts": {"prompt": Q["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "messages": {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
    "no prompt": {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
    "prompt repeated": {"prompt": [Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
    "prompt as text": {"prompt": Q["content"], "chosen": [GOOD], "rejected": [BAD]},
    "prompt as text, repeated": {
        "prompt": Q["content"] + "\n",  # UltraFeedback
        "chosen": [Q, GOOD],
        "rejected": [Q, BAD],
    },
}


@pytest.mark.parametrize("form", PAIRS)
def test_forms_of_a_pair(form):
    row, unused = convert_pair(PAIRS[form], "a:1")
    train = form == "texts"  # where the roles say it all
    assert told(row.chosen) == [(*ASKED[:2], train), ("assistant", "It is four.", True)]
    assert told(row.rejected) == [(*ASKED[:2], train), ("assistant", "It is five.", True)]
    assert (row.margin, row.source, row.where, unused) == (0.0, "", "a:1", frozenset())


def test_only_the_answers_of_a_long_conversation_are_trained():
    pair, _ = convert_pair({"chosen": [*HISTORY, GOOD, Q, BAD], "rejected": [*HISTORY, BAD]}, "a:1")
    assert [turn.train for turn in pair.chosen.turns] == [False] * 3 + [True] * 3
    assert [turn.train for turn in pair.rejected.turns] == [False] * 3 + [True]
    tools = {"prompt": HISTORY, "chosen": [GOOD], "rejected": [BAD], "tools": "[{}]", "id": 1}
    pair, unused = convert_pair(tools, "a:1")
    assert pair.chosen.tools == pair.rejected.tools == [{}] and unused == {"id"}


def test_margin_and_source():
    row = PAIRS["texts"] | {"margin": "0.5", "source": "math", "score": 1}
    pair, unused = convert_pair(row, "a:1")
    assert (pair.margin, pair.source, unused) == (0.5, "math", {"score"})
    pair, unused = convert_pair(row | {"margin": "big"}, "a:1", margins=False)
    assert (pair.margin, unused) == (0.0, {"margin", "score"})
    assert convert_unpaired(row, "a:1")[1] == {"margin", "score"}
    assert convert_pair(PAIRS["texts"] | {"margin": ""}, "a:1")[0].margin == 0.0
    assert convert_pair(PAIRS["texts"] | {"margin": None}, "a:1")[0].margin == 0.0


DIALOGUE = (
    "\n\nHuman: Hello there!\n\nAssistant: How are you?\n\nHuman: Two plus two?\n\nAssistant:"
)


def test_dialogues_in_one_text():
    """Anthropic's HH data: the answers may begin alike, and the prompt ends before them."""
    row = {"chosen": DIALOGUE + " It is four.", "rejected": DIALOGUE + " It is five."}
    pair, _ = convert_pair(row, "a:1")
    asked = [("user", "Hello there!"), ("assistant", "How are you?"), ("user", "Two plus two?")]
    assert told(pair.chosen) == [(*turn, False) for turn in asked] + [
        ("assistant", "It is four.", True)
    ]
    assert told(pair.rejected)[-1] == ("assistant", "It is five.", True)
    text = "".join(turn.mark + turn.content for turn in pair.chosen.turns)
    assert text == row["chosen"] and pair.chosen.separator == ""


def test_texts_without_a_prompt_only_on_request():
    row = {"chosen": "It is four.", "rejected": "It is five."}
    with pytest.raises(UserError, match="a:1: chosen and rejected are texts without a prompt"):
        convert_pair(row, "a:1")
    pair, _ = convert_pair(row, "a:1", whole_texts=True)
    assert (pair.chosen, pair.rejected) == (Text("It is four.", "a:1"), Text("It is five.", "a:1"))


BAD_PAIRS = [
    ({"chosen": "a"}, "needs chosen and rejected, but has no rejected: its columns are 'chosen'"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same; leave"),
    ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "chosen and rejected are the same"),
    ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "both be text or both messages, not text"),
    ({"prompt": [Q], "chosen": "a", "rejected": "b"}, "so prompt must be text, not a list"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "not text and a number (5)"),
    ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "prompt must be a list of messages, not"),
    ({"prompt": "q", "chosen": [], "rejected": [BAD]}, "chosen is an empty list"),
    ({"chosen": [Q, GOOD], "rejected": [user("x"), BAD]}, "begin with different messages"),
    ({"chosen": [Q, GOOD], "rejected": [Q]}, "rejected has no answer: it ends with the messages"),
    ({"prompt": [Q], "chosen": [Q], "rejected": [Q, BAD]}, "chosen has no answer"),
    ({"chosen": [Q, user("x"), GOOD], "rejected": [Q, BAD]}, "chosen goes on with the role user"),
    (
        {"prompt": [HISTORY[0], Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        "after the prompt, chosen goes on with the role user; only answers of the assistant",
    ),
    ({"prompt": [Q], "chosen": [GOOD], "rejected": [Q, BAD]}, "rejected goes on with the role us"),
    (
        {"prompt": "other", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        "prompt is none of the messages that chosen and rejected both begin with; leave it out",
    ),
    (
        {"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: x\n\nAssistant: a"},
        "begin with different messages",
    ),
    ({"chosen": DIALOGUE + " a", "rejected": "b"}, "texts without a prompt"),
    (PAIRS["texts"] | {"margin": "big"}, "margin must be a finite number, not 'big'"),
    (PAIRS["texts"] | {"margin": float("nan")}, "margin must be a finite number, not a number (na"),
    (PAIRS["texts"] | {"source": 3}, "source must be text, not a number (3)"),
    (PAIRS["texts"] | {"chosen": "\ud800"}, "chosen holds half a character"),
    ("text", "a row must be an object with named fields, not text"),
]
BAD_UNPAIRED = [
    ({"prompt": "q", "completion": "a"}, "label, but has no label: its columns are"),
    ({"prompt": "q", "label": True}, "but has no completion or messages"),
    ({"prompt": "q", "completion": "a", "label": 2}, "label must be true or false (or 1 or 0), no"),
    ({"prompt": "q", "completion": "a", "label": "good"}, "not 'good'"),
    ({"prompt": "q", "completion": [GOOD], "label": 1}, "prompt and completion must both be text"),
    (
        {"prompt": [Q], "completion": [Q, GOOD], "label": 1},
        "completion begins with the role user; it must be the assistant's answer alone",
    ),
    ({"messages": [Q], "label": 1}, "messages must end with the assistant's message that has the"),
    ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
]
BAD_SCORED = [
    ({"text": "a", "label": "high"}, "label must be a finite number, not 'high'"),
    ({"text": "a", "label": [1]}, "label must be a finite number, not a list"),
    ({"text": " ", "label": 1}, "text is empty"),
    ({"label": 1}, "needs prompt or messages or text and completion or messages or text and label"),
    ({"prompt": "q", "label": 1}, "but has no completion or messages or text"),
]
BAD_STEPS = [
    ({"prompt": "q", "steps": ["a"]}, "needs prompt and completions or steps and labels, but has "),
    ({"prompt": "q", "steps": ["a"], "labels": [1, 0]}, "1 steps but 2 labels; each step has one"),
    ({"prompt": "q", "completions": [], "labels": []}, "completions must be a list with at least"),
    ({"prompt": "q", "steps": "a", "labels": [1]}, "steps must be a list with at least one elemen"),
    ({"prompt": "q", "steps": ["a", " "], "labels": [1, 1]}, "steps[1] is empty; leave it and its"),
    ({"prompt": "q", "steps": ["a", 1], "labels": [1, 1]}, "steps[1] must be text, not a number"),
    ({"prompt": "q", "steps": ["a"], "labels": [0.5]}, "labels[0] must be true or false"),
    ({"prompt": 1, "steps": ["a"], "labels": [1]}, "prompt must be a list of messages, not a num"),
]
CASES = [
    (convert, row, what)
    for convert, cases in (
        (convert_pair, BAD_PAIRS),
        (convert_unpaired, BAD_UNPAIRED),
        (convert_scored, BAD_SCORED),
        (convert_steps, BAD_STEPS),
    )
    for row, what in cases
]


@pytest.mark.parametrize(("convert", "row", "what"), CASES)
def test_a_bad_row_says_what_and_where(convert, row, what):
    with pytest.raises(UserError) as caught:
        convert(row, "data.jsonl:7")
    text = str(caught.value)
    assert text.startswith("data.jsonl:7: ") and what in text and "\n" not in text


def test_bad_rows_are_stopped_at_or_counted(write):
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    path = write("a.jsonl", [PAIRS["texts"], same, PAIRS["messages"] | {"id": 7}])
    with pytest.raises(UserError) as caught:
        read_rows(path, convert=convert_pair)
    assert str(caught.value) == (
        f"{path}:2: chosen and rejected are the same; leave the row out {SKIP_HINT}"
    )
    rows = read_rows(path, on_bad_rows="skip", convert=convert_pair)
    assert len(rows) == 2 and rows.bad.count == 1 and rows.unused_columns == ("id",)


def test_unpaired_rows():
    row, unused = convert_unpaired({"prompt": "q", "completion": "a", "label": False, "x": 1}, "a")
    assert told(row.answered) == [("user", "q", True), ("assistant", "a", True)]
    assert (row.label, unused) == (0.0, {"x"})
    for label in (True, 1, 1.0, "1", "True", " true "):
        row, _ = convert_unpaired({"prompt": [Q], "completion": [GOOD], "label": label}, "a")
        assert row.label == 1.0
    row, _ = convert_unpaired({"messages": [*HISTORY, GOOD], "label": "0", "source": "s"}, "a")
    assert [turn.train for turn in row.answered.turns] == [False] * 3 + [True]
    assert (row.label, row.source) == (0.0, "s")
    assert isinstance(convert_unpaired(PAIRS["texts"], "a")[0], PairRow)


def test_scored_rows(write):
    row, unused = convert_scored({"text": "a", "label": -0.25, "source": "s"}, "a:1")
    assert row == RatedRow(Text("a", "a:1"), -0.25, "s") and unused == frozenset()
    row, unused = convert_scored({"prompt": "q", "completion": "a", "label": 3, "text": "t"}, "a:1")
    assert told(row.answered)[1] == ("assistant", "a", True) and unused == {"text"}
    assert convert_scored({"messages": [Q, GOOD], "label": 1e-3}, "a")[0].label == 1e-3
    table = write("a.csv", b"prompt,completion,label\nq,a,0.5\nq,b,2\n")
    rows = read_rows(table, convert=convert_scored).rows
    assert [row.label for row in rows] == [0.5, 2.0]


def test_step_rows():
    given = {"prompt": "q", "completions": ["a", "b"], "labels": [True, 0], "steps": 1, "x": 2}
    row, unused = convert_steps(given, "a:1")
    assert (row.steps, row.labels, unused) == (("a", "b"), (True, False), {"steps", "x"})
    assert told(row.prompt) == [("user", "q", True)] and row.prompt.separator == ""
    row, _ = convert_steps({"prompt": HISTORY, "steps": ["a"], "labels": ["1"]}, "a:1")
    assert isinstance(row.prompt, Chat) and len(row.prompt.turns) == 3 and row.where == "a:1"
