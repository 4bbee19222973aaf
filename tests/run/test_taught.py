"""Distillation from a file of a teacher's likeliest tokens: written, read, refused."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mud_puppy as mp
from tests.run.test_distillation import losses, run, teacher

__all__ = ["run", "teacher"]  # fixtures
ALL = 258  # tokens of the tokenizer, and rows of the student
KEYS = {"max_steps": 3, "eval_split": 0.25, "batch_size": 4, "distill_beta": 0.3}
ALONE = KEYS | {"teacher": None}


@pytest.fixture
def whole(run: Callable, tmp_path: Path) -> tuple[Path, list[dict[str, float]]]:
    """(a file of all words, metrics of the run that wrote and read it)."""
    path = tmp_path / "deep" / "teacher.safetensors"
    keys = KEYS | {"teacher_logits": str(path), "distill_top_k": 1000}
    _, lines = run(**keys, output=str(tmp_path / "wrote"))
    return path, lines


def same(lines: list[dict[str, float]], others: list[dict[str, float]], rel: float) -> bool:
    names = ("loss", "eval_loss", "grad_norm")
    pairs = [
        (line[name], other[name])
        for line, other in zip(lines, others, strict=True)
        for name in names
        if name in other
    ]
    assert len(pairs) == 8
    return all(found == pytest.approx(wanted, rel=rel) for found, wanted in pairs)


def test_all_words_of_a_file_are_the_teacher(run: Any, whole: Any, tmp_path: Path) -> None:
    """Written and read; read again without the teacher, from another order, by threads; and few
    words are not all."""
    path, lines = whole
    held = load_file(path)
    assert held["ids"].shape == (len(held["tokens"]), ALL)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    _, wanted = run(**KEYS, output=str(tmp_path / "live"))
    assert same(lines, wanted, 1e-4)

    cuts = held["offsets"]
    order = [slice(a, b) for a, b in pairwise(cuts)][::-1]
    moved = {name: np.concatenate([held[name][s] for s in order]) for name in ("tokens", "ids")}
    moved["logprobs"] = np.concatenate([held["logprobs"][s] for s in order])
    # What stands in a sequence's last row is not looked at.
    last = np.cumsum([s.stop - s.start for s in order]) - 1
    moved["ids"][last], moved["logprobs"][last] = 10**6, np.nan
    moved["offsets"] = np.cumsum([0, *(s.stop - s.start for s in order)])
    save_file(moved, tmp_path / "theirs.safetensors")  # temperature 1 is what none means
    keys = ALONE | {"teacher_logits": str(tmp_path / "theirs.safetensors"), "num_workers": 2}
    _, again = run(**keys, output=str(tmp_path / "again"))
    assert same(again, lines, 1e-6)

    few = {name: held[name][:, :3].copy() for name in ("ids", "logprobs")}
    save_file(held | few, tmp_path / "few.safetensors")
    keys = ALONE | {"teacher_logits": str(tmp_path / "few.safetensors"), "max_steps": 1}
    _, other = run(**keys, output=str(tmp_path / "few"))
    assert losses(other)[0] < 0.98 * losses(lines)[0]


def changed(held: dict[str, np.ndarray], name: str, value: Any) -> dict[str, np.ndarray]:
    copy = held[name].copy()
    copy.reshape(-1)[:2] = value
    return held | {name: copy}


def test_files_that_are_not_of_this_run(run: Any, whole: Any, tmp_path: Path) -> None:
    held = load_file(whole[0])
    path = tmp_path / "bad.safetensors"
    keys = ALONE | {"teacher_logits": str(path), "output": str(tmp_path / "none")}
    for bad, words in (
        (
            changed(held, "tokens", 7),
            r"chats.jsonl:\d+.*: teacher_logits .* has no sequence",
        ),
        (changed(held, "ids", ALL), f"names token {ALL}, and the student has {ALL}"),
        (changed(held, "logprobs", 0.0), "probabilities of .* in all"),
        (changed(held, "logprobs", np.nan), "probabilities of nan in all"),
        (changed(held, "offsets", 1), "offsets must rise from 0"),
        (changed(held, "temperature", 2.0), "is of temperature 2, and distill_temperature is 1"),
        (held | {"ids": held["ids"][:-1]}, "must have one row for each of the"),
        (held | {"logprobs": held["logprobs"].astype(np.float64)}, "stored as .F64"),
        ({name: x for name, x in held.items() if name != "ids"}, "has no tensor ids, I32"),
    ):
        save_file(bad, path)
        with pytest.raises(mp.UserError, match=words):
            run(**keys)
    save_file(held | {name: held[name][:, :3].copy() for name in ("ids", "logprobs")}, path)
    with pytest.raises(mp.UserError, match="has 3 tokens after each, and distill_top_k is 16"):
        run(**(keys | {"teacher": str(whole[0].parent / "teacher"), "distill_top_k": 16}))
    path.unlink()
    with pytest.raises(mp.UserError, match=r"no such file.*Give the teacher"):
        run(**keys)


@pytest.mark.slow
def test_a_resumed_run_reads_its_file(run: Any, tmp_path: Path) -> None:
    keys = {"teacher_logits": str(tmp_path / "t.safetensors"), "save_steps": 2, "distill_top_k": 8}
    keys |= {"distill_temperature": 0.9}
    keys |= {"lr_scheduler": "constant", "gradient_accumulation": 2}
    _, whole = run(**keys, max_steps=4, output=str(tmp_path / "a"))
    written = (tmp_path / "t.safetensors").stat().st_mtime_ns
    run(**keys, max_steps=2, output=str(tmp_path / "b"))
    _, parts = run(**keys, max_steps=4, output=str(tmp_path / "b"), resume=True)
    assert losses(parts) == losses(whole)
    assert (tmp_path / "t.safetensors").stat().st_mtime_ns == written
