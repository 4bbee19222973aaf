"""Whatever a user gets wrong is one line on stderr and exit code 2; nothing is written or lost.

Every case goes through the real entry points, with a model folder and data that are sound but for
the one thing that its table names.
"""

import shutil
from typing import Any

import pytest

import mud_puppy as mp
from mud_puppy.cli import main
from tests.bad_inputs.bench import SMALL, Bench, assert_one_line, files


@pytest.fixture(scope="session")
def finished(chat_model, chats, tmp_path_factory):
    """The output folder of a run of two steps."""
    keys = {"model": str(chat_model), "dataset": str(chats), "lora_r": 4} | SMALL
    return mp.train(keys | {"output": str(tmp_path_factory.mktemp("run"))}).output


@pytest.fixture
def bench(chat_model, chats, finished, tmp_path):
    shutil.copytree(chat_model, tmp_path / "m")
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(chats, tmp_path / "d.jsonl")
    return Bench(*(tmp_path / name for name in ("", "m", "d.jsonl", "run", "out")))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No case here names anything of the hub, so none may ask it."""

    def asked(*args, **settings):
        raise AssertionError(f"asked the hub: {args}")

    monkeypatch.setattr("mud_puppy.data.rows.read_hub", asked)
    monkeypatch.setattr("mud_puppy.model.files._download", asked)


@pytest.fixture
def refused(bench, capsys):
    """refused(argv, *parts): the command line is refused, by a line with these parts."""

    def run(argv: list[Any], *parts: str) -> None:
        before = files(bench.root)
        assert main([str(word) for word in argv]) == 2
        printed = capsys.readouterr()
        assert_one_line(printed.err, parts)
        assert printed.out == ""
        assert files(bench.root) == before, "something was written or lost"

    return run
