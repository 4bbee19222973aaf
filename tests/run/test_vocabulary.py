"""Runs with added tokens: the embedding gets their rows and trains them; the result has both."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.errors import UserError
from mud_puppy.plan.step import shapes_of
from mud_puppy.results import export_run
from tests.conftest import QUESTIONS

TOKENS = ["<red>", "say "]
KEPT = "model dataset output added_tokens".split()


@pytest.fixture
def keys(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A short full run on chats that use the first of the added tokens."""
    path = tmp_path / "tagged.jsonl"
    rows = [
        [{"role": "user", "content": "which?"}, {"role": "assistant", "content": f"<red>{word}"}]
        for word in QUESTIONS
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    del config["lora_r"]
    return config | {"method": "full", "dataset": str(path), "added_tokens": TOKENS}


def test_new_rows_train_and_are_saved(keys: dict[str, Any], tmp_path: Path) -> None:
    out = mp.train(keys).output
    tokenizer = mp.load_tokenizer(out)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids == [258, 259]
    assert tokenizer("x<red>say y", add_special_tokens=False)["input_ids"][1:3] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<red>say "
    model, params = mp.load(out, dtype=None)
    assert params["embed"].shape == (260, 32) and model.arch.vocab_size == 260
    # From one mean row: the one that the data use went another way than the one they do not.
    _, before = mp.load(keys["model"], dtype=None)
    mean = np.asarray(before["embed"]).mean(0)
    moved = np.abs(np.asarray(params["embed"])[258:] - mean).max(1)
    assert moved[0] > 0 and np.abs(np.diff(np.asarray(params["embed"])[258:], axis=0)).max() > 1e-3
    export_run(out, tmp_path / "again")
    _, again = mp.load(tmp_path / "again", dtype=None)
    assert np.array_equal(again["embed"], params["embed"])
    assert len(mp.load_tokenizer(tmp_path / "again")) == 260


def test_a_run_goes_on_with_its_tokens(keys: dict[str, Any]) -> None:
    mp.train(keys | {"max_steps": 3})
    assert mp.train(keys | {"resume": True}).steps == keys["max_steps"]
    with pytest.raises(UserError, match=r"does not fit this run.*258"):
        mp.train({k: v for k, v in keys.items() if k != "added_tokens"} | {"resume": True})


def test_without_rows_the_data_are_refused(
    keys: dict[str, Any], chat_model: Path, tmp_path: Path
) -> None:
    """A tokenizer that is larger than the embedding: said before the weights are read."""
    model, params = mp.load(chat_model, dtype=None)
    tokenizer = mp.load_tokenizer(chat_model)
    tokenizer.add_tokens(TOKENS)
    mp.save_hf(model, params, tmp_path / "m", "float32", tokenizer)
    small = {k: v for k, v in keys.items() if k != "added_tokens"} | {"model": str(tmp_path / "m")}
    says = r"token 258 \('<red>'\) is outside the model's vocabulary of 258: .*added_tokens"
    with pytest.raises(UserError, match=says):
        mp.train(small)
    # Naming them is what helps: they have their ids already.
    result = mp.train(small | {"added_tokens": TOKENS, "max_steps": 1})
    assert result.params["embed"].shape == (260, 32)


def test_tokens_that_are_there_change_nothing(keys: dict[str, Any]) -> None:
    result = mp.train(keys | {"added_tokens": ["<|im_start|>", "r"], "max_steps": 1})
    assert result.params["embed"].shape == (258, 32)


def test_what_is_trained_for_codes_has_them_too(keys: dict[str, Any]) -> None:
    out = mp.train(keys | {"method": "qat", "max_steps": 1}).output
    for folder in (out, out / "qat_int8"):
        assert mp.abstract(folder)[1]["embed"].shape == (260, 32)
        assert mp.load(folder)[1]["embed"].shape == (260, 32)
        assert len(mp.load_tokenizer(folder)) == 260


@pytest.mark.parametrize("method", ["lora", "qlora", "gptq"])
def test_methods_that_train_no_rows_refuse_them(method: str, keys: dict[str, Any]) -> None:
    why = r"added_tokens needs method full, or qat without qat_lora \(adapters have no rows"
    with pytest.raises(UserError, match=why):
        mp.Config.load({k: keys[k] for k in KEPT} | {"method": method})


def test_a_plan_counts_them(keys: dict[str, Any]) -> None:
    config = mp.Config.load(keys)
    model, shapes = shapes_of(config, config.model)
    assert shapes["embed"].shape == (260, 32) and model.arch.vocab_size == 260
    assert shapes_of(replace(config, added_tokens=None), config.model)[1]["embed"].shape[0] == 258
