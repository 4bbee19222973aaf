"""Data of preferences, ratings and steps that cannot be trained on, previewed or scored."""

import json
from typing import Any

import pytest

from mud_puppy.cli import main

PAIR = {"prompt": "say a", "chosen": "a", "rejected": "b"}
STEPS = {"prompt": "say a", "steps": ["a", "b"], "labels": [1, 0]}
RATED = {"prompt": "say a", "completion": "a", "label": True}
NAN, SKIP = float("nan"), "on_bad_rows skip"
METHODS = {
    "dpo": ["--method", "preference"],
    "kto": ["--method", "preference", "--preference", "kto"],
    "rm": ["--method", "rm"],
    "labels": ["--method", "rm", "--reward", "labels"],
    "prm": ["--method", "prm"],
}

# name: (methods, rows, what the line says)
ROWS: dict[str, tuple[str, list[Any], tuple[str, ...]]] = {
    "none": ("dpo kto rm labels prm", [], ("d.jsonl holds no rows",)),
    "a list": ("dpo prm", [[1]], ("d.jsonl:1: a row must be an object",)),
    "prompt only": ("dpo rm", [{"prompt": "x"}], ("needs chosen and rejected, but has no chosen",)),
    "no label": ("kto labels", [{"prompt": "p", "completion": "c"}], ("but has no label",)),
    "other kinds": ("dpo rm", [PAIR, STEPS], ("d.jsonl:2: needs chosen and rejected", SKIP)),
    "pairs as steps": ("prm", [PAIR], ("has no completions or steps: its columns are",)),
    "pairs as labels": ("labels", [PAIR], ("but has no completion or messages or text",)),
    "equal answers": ("dpo rm", [PAIR | {"rejected": "a"}], ("are the same; leave the row out",)),
    "text and messages": (
        "dpo rm",
        [PAIR | {"chosen": [{"role": "assistant", "content": "a"}]}],
        ("chosen and rejected must both be text or both messages, not a list and text",),
    ),
    "margin": ("rm", [PAIR | {"margin": NAN}], ("margin must be a finite number",)),
    "source": ("dpo rm", [PAIR | {"source": 5}], ("source must be text, not a number (5)",)),
    "half a character": ("dpo rm", [PAIR | {"chosen": "\ud800"}], ("holds half a character",)),
    "kto's label": ("kto", [RATED | {"label": 2}], ("label must be true or false (or 1 or 0)",)),
    "a label of nan": ("kto", [RATED | {"label": NAN}], ("label must be true or false",)),
    "a number of nan": ("labels", [RATED | {"label": NAN}], ("label must be a finite number",)),
    "too few labels": ("prm", [STEPS | {"labels": [1]}], ("2 steps but 1 labels",)),
    "a step's label": ("prm", [STEPS | {"labels": [1, 2]}], ("labels[1] must be true or false",)),
    "an empty step": ("prm", [STEPS | {"steps": ["a", ""]}], ("steps[1] is empty",)),
    "long answers": (
        "dpo kto rm",
        [PAIR | {"chosen": 300 * "a", "rejected": 300 * "b"}],
        ("none of 1 rows can be trained on", "an answer alone is longer than max_seq_length"),
    ),
}
CASES = [(method, name) for name, (methods, *_) in ROWS.items() for method in methods.split()]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_rows(method, name, bench, refused):
    _, rows, says = ROWS[name]
    bench.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(bench.train(*METHODS[method]), *says)
    preview = ["preview", bench.data, "--model", bench.model, "--max-seq-length", "64"]
    refused([*preview, *METHODS[method]], *says)


def test_pairs_without_a_method_are_told_theirs(bench, refused):
    bench.data.write_text(json.dumps(PAIR))
    refused(bench.train(), "no known format has the columns", "pairs are for method preference")
    bench.data.write_text(json.dumps(STEPS))
    refused(bench.train(), "no known format has the columns", "with labels are for method prm")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_sound_is_not_refused(method, bench, capsys):
    """The partner of all cases."""
    row = {"prm": STEPS, "labels": RATED}.get(method, PAIR)
    bench.data.write_text(json.dumps(row))
    preview = ["preview", bench.data, "--model", bench.model, "--max-seq-length", "64"]
    assert main([str(word) for word in [*preview, *METHODS[method]]]) == 0
    assert "1 rows in" in capsys.readouterr().out
