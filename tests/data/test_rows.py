"""Reading files: every kind, every fault with its file and line, and no hub call for a path."""

import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from mud_puppy.data.formats import Chat, Text
from mud_puppy.data.report import SKIP_HINT
from mud_puppy.data.rows import read_rows
from mud_puppy.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
PAIR = {"prompt": "a", "completion": "b"}


def contents(rows):
    return [
        row.text if isinstance(row, Text) else [turn.content for turn in row.turns]
        for row in rows.rows
    ]


def test_jsonl_with_bom_blank_lines_and_mixed_formats(write):
    lines = [json.dumps(CHAT), "", json.dumps(PAIR), "   ", json.dumps({"text": "é"})]
    rows = read_rows(write("a.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode()))
    assert contents(rows) == [["hi", "yo"], ["a", "b"], "é"]
    assert [row.where.rsplit(":", 1)[1] for row in rows.rows] == ["1", "3", "5"]
    assert rows.bad.count == 0 and rows.unused_columns == ()


def test_json_array_knows_lines(write):
    text = (
        '[\n  {"text": "one\\ntwo"},\n\n  {"prompt": "a",\n'
        '   "completion": "b"}, {"text": "c"}\n]\n'
    )
    rows = read_rows(write("a.json", text.encode()))
    assert contents(rows) == ["one\ntwo", ["a", "b"], "c"]
    assert [row.where.rsplit(":", 1)[1] for row in rows.rows] == ["2", "4", "5"]


def test_json_file_that_holds_lines_or_one_object(write):
    assert len(read_rows(write("a.json", [PAIR, CHAT]))) == 2
    assert len(read_rows(write("b.json", json.dumps(PAIR, indent=1).encode()))) == 1


def test_csv_text_and_parquet(write, tmp_path):
    table = b'\xef\xbb\xbfprompt,completion,id\n"a\nb","c ""d""",7\n\nx,y,8\n'
    rows = read_rows(write("a.csv", table))
    assert contents(rows) == [["a\nb", 'c "d"'], ["x", "y"]]
    assert [row.where.rsplit(":", 1)[1] for row in rows.rows] == ["2", "5"]
    assert rows.unused_columns == ("id",)
    assert contents(read_rows(write("a.txt", b"one \r\n\n two\n"))) == ["one ", " two"]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR | {"messages": None}, CHAT]), path)
    rows = read_rows(path)
    assert contents(rows) == [["a", "b"], ["hi", "yo"]]
    assert rows.rows[1].where == f"{path}:2"


BAD_LINES = [
    (b'{"text": "x"', "not JSON: Expecting ',' delimiter"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff"),
    (b'["text"]', "a row must be an object with named fields, not a list"),
    (b"3", "not a number (3)"),
    (b"[" * 200_000, "not usable JSON"),
    (b'{"txt": "x"}', "no known format has the columns 'txt'; known are messages, prompt + "),
    (b'{"text": 5}', "text must be text, not a number (5)"),
    (b'{"text": "  "}', "text is empty"),
    (b'{"text": "\\ud800"}', "text holds half a character (U+D800)"),
    (b'{"prompt": "a"}', "no known format"),
    (b'{"prompt": "a", "completion": 1.5}', "both be text or both messages"),
    (b'{"prompt": "a", "completion": []}', "text and a list"),
    (b'{"instruction": "a", "output": null}', "no known format"),
    (b'{"messages": "hi"}', "messages must be a list of messages, not text"),
    (b'{"messages": []}', "messages is an empty list"),
    (b'{"messages": ["hi"]}', "messages[0] must be an object with role and content, not text"),
    (b'{"messages": [{"content": "x"}]}', "messages[0]: unknown role None"),
    (
        b'{"messages": [{"role": "asistant", "content": "x"}]}',
        "messages[0]: unknown role 'asistant'; known are system, user, assistant, tool. "
        "Did you mean 'assistant'?",
    ),
    (b'{"messages": [{"role": "user"}]}', "messages[0] has no content"),
    (b'{"messages": [{"role": "user", "content": 1}]}', "content must be text, not a number (1)"),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "messages[0].content[0] is a part of type 'image'; only text parts are read",
    ),
    (b'{"messages": [{"role": "user", "content": "", "train": 1}]}', "train must be true or"),
    (b'{"messages": [{"role": "user", "content": "", "weight": 0.5}]}', "weight must be 0 or 1"),
    (b'{"messages": [{"role": "user", "content": ""}], "tools": "{"}', "tools is not JSON"),
    (b'{"messages": [{"role": "user", "content": ""}], "tools": "{}"}', "tools must be a list"),
]


@pytest.mark.parametrize(("line", "what"), BAD_LINES)
def test_a_bad_line_stops_or_is_counted(write, line, what):
    path = write("a.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert what in str(caught.value) and "\n" not in str(caught.value)
    rows = read_rows(path, on_bad_rows="skip")
    assert contents(rows) == ["one", "two"]
    assert rows.bad.count == 1 and str(caught.value) == f"{rows.bad.messages[0]} {SKIP_HINT}"


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("a.json", b'[{"text": "x"},\n {"text": }]', 2, "not JSON: Expecting value"),
        ("a.json", b'[{"text": "x"}\n {"text": "y"}]', 2, "expected , or ] after the row"),
        ("a.json", b'[{"text": "x"},\n "y"]', 2, "must be an object"),
        ("a.csv", b"text,id\nx,1\ny\n", 3, "1 fields where the header has 2"),
        ("a.csv", b"text,id\nx,1\n\xff,2\n", 3, "not UTF-8"),
        ("a.csv", b'text,id\nx,1\n"y,2\n', 3, "not CSV"),
        ("a.txt", b"x\n\xff\n", 2, "not UTF-8"),
    ],
)
def test_faults_in_other_kinds_of_file(write, name, content, line, what):
    path = write(name, content)
    with pytest.raises(UserError, match=f":{line}: ") as caught:
        read_rows(path)
    assert what in str(caught.value)
    rows = read_rows(path, on_bad_rows="skip")
    assert contents(rows) == ["x"] and rows.bad.count == 1


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b"[ ]", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.json", b'\n\n["\xff"]', ":3: not UTF-8"),
        ("a.csv", b"text,text\nx,y\n", ":1: a header must be UTF-8, with no name twice"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.jsonl", b"x\ny\n", "all 2 rows are bad; the first: "),
        ("a.tsv", b"text\nx\n", "unknown kind of file; known are .jsonl, .json, .parquet"),
        ("a.jsonl.gz", b"", "unknown kind of file"),
    ],
)
def test_files_with_no_row(write, name, content, what):
    with pytest.raises(UserError) as caught:
        read_rows(write(name, content), on_bad_rows="skip")
    assert what in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` that records what it is asked for."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\nmore")
        return [PAIR, CHAT]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    "source",
    ["/no/x", "./x", "../x/y", "~/x/y", "x.jsonl", "owner/x.json", "a/b/c", "x.jsonl.gz", "a b"],
)
def test_a_path_is_never_looked_up_on_the_hub(hub, source):
    with pytest.raises(UserError, match="does not exist"):
        read_rows(source)
    assert hub == []


def test_hub_names(hub):
    rows = read_rows("owner/name")
    assert contents(rows) == [["a", "b"], ["hi", "yo"]] and rows.rows[1].where == "owner/name:2"
    read_rows("owner/name:part", split="test")
    assert hub == [("owner/name", None, "train"), ("owner/name", "part", "test")]
    with pytest.raises(UserError, match=r"no/such is no local file.*doesn't exist$"):
        read_rows("no/such")


def test_an_existing_path_is_local_whatever_it_looks_like(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_rows("owner")
    assert hub == []


def test_options_are_checked(write):
    path = write("a.jsonl", [PAIR])
    with pytest.raises(UserError, match="on_bad_rows must be stop or skip"):
        read_rows(path, on_bad_rows="ignore")
    with pytest.raises(UserError, match="has no split 'test'"):
        read_rows(path, split="test")


def test_another_conversion(write):
    """Preference and reward rows come through the same reader."""
    path = write("a.jsonl", [{"chosen": "x", "id": 1}])
    rows = read_rows(path, convert=lambda value, where: (value["chosen"], frozenset({"id"})))
    assert rows.rows == ("x",) and rows.unused_columns == ("id",)


def test_formats_become_the_same_chat(write):
    rows = read_rows(
        write(
            "a.jsonl",
            [
                {"prompt": "q", "completion": "a"},
                {"input": "q", "output": "a"},
                {"instruction": "q", "response": "a"},
                {"instruction": "q", "input": "", "output": "a"},
                {"messages": [{"role": "user", "content": ["q"]}, CHAT["messages"][1]]},
                {"instruction": "do", "input": "this", "output": "a", "text": "unused"},
            ],
        )
    )
    assert all(isinstance(row, Chat) for row in rows.rows)
    assert contents(rows) == [["q", "a"]] * 4 + [["q", "yo"], ["do\n\nthis", "a"]]
    assert [row.separator for row in rows.rows[:2]] == ["", "\n"]
    assert rows.unused_columns == ("text",)


def test_messages_keep_their_fields_and_say_what_to_train(write):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "q", "name": "ann", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, "c"], "train": False},
    ]
    (row,) = read_rows(write("a.jsonl", [{"messages": turns, "tools": "[{}]"}])).rows
    assert [turn.message for turn in row.turns] == [
        {"role": "user", "content": "q", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "bc"},
    ]
    assert [turn.train for turn in row.turns] == [True, True, False, False]
    assert row.tools == [{}]


def test_prompt_messages_are_not_trained(write):
    row = {"prompt": CHAT["messages"], "completion": CHAT["messages"]}
    (chat,) = read_rows(write("a.jsonl", [row])).rows
    assert [turn.train for turn in chat.turns] == [False, False, True, True]
