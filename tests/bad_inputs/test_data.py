"""Data files that cannot be trained on."""

import json

import pytest


def chat(*turns: tuple[str, str]) -> bytes:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}).encode() + b"\n"


GOOD = chat(("user", "hi"), ("assistant", "ho"))
SKIP = "on_bad_rows skip"

# name: (file, content, flags, what the line says)
DATA: dict[str, tuple[str, bytes, list[str], tuple[str, ...]]] = {
    "empty": ("d.jsonl", b"", [], ("d.jsonl holds no rows", "nothing to train on")),
    "blank": ("d.jsonl", b"\n \n", [], ("d.jsonl holds no rows",)),
    "broken JSON": (
        "d.jsonl",
        GOOD * 2 + b'{"messages": [\n' + GOOD,
        [],
        ("d.jsonl:3: not JSON", "column 15", SKIP),
    ),
    "no object": ("d.jsonl", GOOD + b"[1]\n", [], ("d.jsonl:2: a row must be an object", SKIP)),
    "bad UTF-8": (
        "d.jsonl",
        GOOD + b'{"text": "\xff"}\n',
        [],
        ("d.jsonl:2: not UTF-8: byte 0xff", "save the file as UTF-8"),
    ),
    "UTF-16": ("d.jsonl", GOOD.decode().encode("utf-16"), [], ("d.jsonl:1: not UTF-8",)),
    "no assistant": (
        "d.jsonl",
        GOOD + chat(("user", "hi")),
        [],
        ("d.jsonl:2: no assistant turn to train on in: [user] hi", SKIP),
    ),
    "unknown role": (
        "d.jsonl",
        chat(("user", "hi"), ("asistant", "ho")),
        [],
        ("d.jsonl:1: messages[1]: unknown role 'asistant'", "Did you mean 'assistant'?"),
    ),
    "content is a number": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": 5}]}',
        [],
        ("d.jsonl:1: messages[0]: content must be text, not a number (5)",),
    ),
    "columns": (
        "d.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        [],
        ("d.jsonl:1: no known format has the columns 'question', 'answer'", "prompt + completion"),
    ),
    "all rows bad": (
        "d.jsonl",
        b"1\n[]\n",
        ["--on-bad-rows", "skip"],
        ("d.jsonl: all 2 rows are bad; the first: ", "d.jsonl:1: a row must be an object"),
    ),
    "all rows without answer": (
        "d.jsonl",
        chat(("user", "hi")),
        ["--on-bad-rows", "skip"],
        ("none of 1 rows can be trained on", "d.jsonl:1: no assistant turn"),
    ),
    "unknown kind": ("d.xlsx", b"x", [], ("d.xlsx: unknown kind of file; known are .jsonl",)),
    "truncated JSON": ("d.json", b'[{"text": "a"},', [], ("d.json:1: not JSON",)),
    "CSV row": ("d.csv", b"text,id\nx\n", [], ("d.csv:2: 1 fields where the header has 2",)),
    "parquet": ("d.parquet", b"PAR1", [], ("d.parquet: not a readable parquet file",)),
    "tool calls, no template": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
        b'"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]}',
        ["--no-chat-template"],
        ("d.jsonl:1: tool_calls can only be written by a chat template",),
    ),
    "nothing to hold out": (
        "d.jsonl",
        GOOD,
        ["--eval-split", "0.5"],
        ("cannot hold out 1 of 1 examples", "both sides need at least one"),
    ),
    "longer than the model": (
        "d.jsonl",
        GOOD + chat(("user", "x" * 600), ("assistant", "y")),
        ["--max-seq-length", "4096"],
        ("max_seq_length 4096: ", "d.jsonl:2 has 6", "the model has 512 positions; set"),
    ),
}


@pytest.mark.parametrize(("name", "content", "flags", "says"), DATA.values(), ids=list(DATA))
def test_data(name, content, flags, says, bench, refused):
    path = bench.root / name
    path.write_bytes(content)
    refused(bench.train(*flags, dataset=path), *says)
