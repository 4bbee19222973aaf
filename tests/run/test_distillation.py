"""Runs of method distill: what they learn of a teacher, in codes and out of them, on meshes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.model import scan_layers
from mud_puppy.model.names import flatten
from mud_puppy.parallel import make_mesh
from mud_puppy.run.scores import score_distilled
from mud_puppy.run.teacher import load_teacher
from tests.tiny import tiny_model

TEACHER = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "initializer_range": 0.2}


@pytest.fixture(scope="session")
def teacher(chat_model: Path, tmp_path_factory: Any) -> Path:
    """A wider model of the same tokenizer, whose untied embedding has seven rows of padding."""
    tokenizer = mp.load_tokenizer(chat_model)
    fields = {"vocab_size": len(tokenizer) + 7, "max_position_embeddings": 256}
    model, params = tiny_model(**TEACHER, **fields)
    folder = tmp_path_factory.mktemp("teacher")
    mp.save_hf(model, params, folder, dtype="float32", tokenizer=tokenizer)
    return folder


@pytest.fixture
def run(config: dict[str, Any], teacher: Path) -> Callable[..., Any]:
    """run(**keys) -> (result, metrics lines), of the tiny model taught by the teacher."""

    def train(**keys: Any) -> Any:
        base = config | {"method": "distill", "teacher": str(teacher)}
        if keys.get("tune") == "full":
            del base["lora_r"]
        result = mp.train(base | keys)
        lines = (result.output / "metrics.jsonl").read_text().splitlines()
        return result, [json.loads(line) for line in lines]

    return train


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_student_comes_to_the_teacher(run: Any, tune: str) -> None:
    _, lines = run(tune=tune, max_steps=12, eval_split=0.25)
    before, after = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert after < 0.9 * before


def test_a_teacher_of_the_students_weights_has_nothing_to_teach(run: Any, chat_model: Path) -> None:
    _, lines = run(teacher=str(chat_model), max_steps=1)
    assert abs(losses(lines)[0]) < 1e-6


def test_packing_accumulation_and_devices_change_no_loss(
    run: Any, chats: Path, tmp_path: Path
) -> None:
    """One step of 16 chats: in rows of one, in rows of several, in parts on eight devices."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:16]))
    ways = (
        {"pack_sequences": False, "batch_size": 16},
        {"max_seq_length": 256, "batch_size": 8},
        {"pack_sequences": False, "gradient_accumulation": 2, "mesh": "data=2,fsdp=4"},
    )
    found = []
    for i, keys in enumerate(ways):
        keys = {"batch_size": 8, "output": str(tmp_path / f"{i}"), "dataset": str(few)} | keys
        found.append(run(max_steps=1, **keys)[1][0])
    for other in found[1:]:
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)


def test_adapters_on_codes_learn(run: Any) -> None:
    _, lines = run(tune="qlora", quant_group=16, precision="bf16", teacher_quant="int8")
    assert losses(lines)[-1] < losses(lines)[0]


@pytest.mark.parametrize(("format", "most"), [("int8", 1e-3), ("nf4", 1e-1)])
def test_a_teacher_in_codes_says_almost_the_same(
    config: dict[str, Any], teacher: Path, random_batch: Any, format: str, most: float
) -> None:
    keys = config | {"method": "distill", "teacher": str(teacher)}
    batch = {name: jnp.asarray(x[0]) for name, x in random_batch(0, 1, 2).items()}
    mesh = make_mesh(keys["mesh"])
    plain = load_teacher(Config.load(keys), mesh)
    coded = load_teacher(Config.load(keys | {"teacher_quant": format}), mesh)
    read = partial(score_distilled, batch=batch, run_layers=scan_layers, beta=0.5, temperature=1.0)
    assert most / 500 < read(plain.model, plain.params, coded)["divergence"].mean() < most


def test_the_teacher_is_split_and_kept(config: Any, teacher: Path) -> None:
    """Its weights lie on the mesh by the rules, outlive the steps, and are in no checkpoint."""
    keys = {"method": "distill", "teacher": str(teacher), "mesh": "data=2,fsdp=4"}
    read = Config.load(config | keys | {"teacher_quant": "int8"})
    mesh = make_mesh(read.mesh)
    found = load_teacher(read, mesh)
    whole = {path for path, leaf in flatten(found.params).items() if is_whole(leaf)}
    assert {path for path in whole if "norm" not in path} == set()
    assert not {path for path, leaf in flatten(found.params).items() if leaf is None}


def is_whole(leaf: Any) -> bool:
    parts = jax.tree.leaves(leaf)
    return all(part.addressable_shards[0].data.size == part.size for part in parts)


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(run: Any, tmp_path: Path) -> None:
    keys = {"tune": "full", "save_steps": 2, "lr_scheduler": "constant", "distill_sft": 0.3}
    _, whole = run(**keys, max_steps=4, output=str(tmp_path / "a"))
    run(**keys, max_steps=2, output=str(tmp_path / "b"))
    result, parts = run(**keys, max_steps=4, output=str(tmp_path / "b"), resume=True)
    assert losses(parts) == losses(whole)
    for line in whole:
        assert line["loss"] == pytest.approx(line["divergence"] + 0.3 * line["nll"], rel=1e-5)
    held = sum(x.nbytes for x in jax.tree.leaves(result.params))
    files = (result.output / "checkpoint-4").rglob("*")
    # The masters and their two moments, and no teacher.
    assert 3 * held < sum(p.stat().st_size for p in files if p.is_file()) < 4 * held


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_position_embeddings": 8}, "tokens, but the teacher .* has 8 positions"),
        ({"words": ["<new>"]}, "another tokenizer than .*: token 258 is '<new>' there, None here"),
    ],
)
def test_teachers_that_cannot_teach_this(
    run: Any, chat_model: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    tokenizer = mp.load_tokenizer(chat_model)
    tokenizer.add_tokens(change.pop("words", []))
    model, params = tiny_model(vocab_size=len(tokenizer), **change)
    mp.save_hf(model, params, tmp_path / "t", dtype="float32", tokenizer=tokenizer)
    with pytest.raises(mp.UserError, match=words):
        run(teacher=str(tmp_path / "t"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"teacher": None}, "method distill needs a teacher"),
        ({"method": "lora"}, "teacher needs method distill"),
        ({"distill_beta": 1.5}, "is not a number from 0 to 1"),
        ({"distill_temperature": 0.0}, "above 0"),
        ({"teacher_quant": "nf5"}, "Did you mean"),
        ({"precision": "fp8"}, "method distill has no float8 products"),
        ({"beta": 0.1}, "beta needs method preference"),
    ],
)
def test_keys_that_mean_nothing(keys: dict[str, Any], words: str) -> None:
    base = {"model": "m", "dataset": "d", "output": "o", "method": "distill", "teacher": "t"}
    with pytest.raises(mp.UserError, match=words):
        Config.load(base | keys)
