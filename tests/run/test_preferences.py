"""Runs of methods preference, rm and prm: what trains, against what, and what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.parallel import make_mesh
from mud_puppy.run.methods import method_of
from mud_puppy.run.prepare import load_params
from mud_puppy.run.reference import kept_of, reference
from mud_puppy.weights import is_weight

WORDS = "red blue green one two three cat dog".split()


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = [
    {"prompt": f"say {w}", "chosen": said(f"{w} {w}"), "rejected": said("no")} for w in 4 * WORDS
]
ROWS = {
    "pairs": PAIRS,
    "rated": [
        {"prompt": row["prompt"], "completion": row[name][0]["content"], "label": name == "chosen"}
        for row in PAIRS
        for name in ("chosen", "rejected")
    ],
    "scored": [
        {
            "prompt": row["prompt"],
            "completion": row[name][0]["content"],
            "label": float(name == "chosen") - 0.5,
        }
        for row in PAIRS
        for name in ("chosen", "rejected")
    ],
    "steps": [
        {"prompt": f"say {w}", "steps": steps, "labels": [step != "no" for step in steps]}
        for w in 2 * WORDS
        for steps in ([w, "no"], [w, "no", w])
    ],
}


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """run(rows, **keys) -> (result, metrics lines), of the tiny model."""

    def train(rows: str, **keys: Any) -> Any:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[rows]))
        base = config | {"method": "preference", "dataset": str(path), "max_steps": 8}
        if "eval_split" not in keys:
            base |= {"eval_split": 0.25, "eval_steps": 8}
        if keys.get("tune") == "full":
            del base["lora_r"]
        result = mp.train(base | keys)
        lines = (result.output / "metrics.jsonl").read_text().splitlines()
        return result, [json.loads(line) for line in lines]

    return train


def steps(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [line for line in lines if "loss" in line]


def evaluations(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [line for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_dpo_prefers_what_it_is_shown(run: Any, tune: str) -> None:
    _, lines = run("pairs", tune=tune)
    first, last = steps(lines)[0], steps(lines)[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is the reference
    assert last["loss"] < 0.4 and last["rewards/accuracies"] == 1
    before, after = evaluations(lines)
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert after["eval_loss"] < 0.4 and after["eval_rewards/accuracies"] == 1


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_rated_answers(run: Any, loss: str) -> None:
    _, lines = run("rated", preference=loss, beta=0.5)
    before, after = evaluations(lines)
    assert before["eval_loss"] == pytest.approx(0.5, abs=1e-4)
    assert after["eval_loss"] < 0.4
    assert after["eval_rewards/chosen"] > after["eval_rewards/rejected"]


def test_pairs_do_for_rated_answers_too(run: Any) -> None:
    _, lines = run("pairs", preference="kto", max_steps=1)
    assert steps(lines)[0]["loss"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("loss", ["orpo", "cpo", "simpo", "sigmoid=0.8,bco_pair=1,sft=0.2"])
def test_other_losses_of_pairs(run: Any, loss: str) -> None:
    _, lines = run("pairs", preference=loss)
    before, after = evaluations(lines)
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]


def test_packing_and_accumulation_change_no_loss(run: Any, tmp_path: Path) -> None:
    """One step of all pairs, in rows of one and of several, at once and in parts."""
    shared = {"max_steps": 1, "max_seq_length": 256, "eval_split": None, "preference": "orpo"}
    found = [
        run("pairs", output=str(tmp_path / f"{i}"), **shared, **keys)
        for i, keys in enumerate(
            (
                {"pack_sequences": False, "batch_size": 32},
                {"pack_sequences": False, "batch_size": 8, "gradient_accumulation": 4},
                {"batch_size": 32},
            )
        )
    ]
    losses = [steps(lines)[0] for _, lines in found]
    for other in losses[1:]:
        assert other["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-4)


def test_a_reward_model(run: Any, tmp_path: Path) -> None:
    result, lines = run("pairs", method="rm", learning_rate=1e-2, merge_lora=True)
    assert evaluations(lines)[-1]["eval_rewards/accuracies"] == 1
    model, params = mp.load(result.output / "merged", dtype="float32")
    assert (model.arch.task, model.arch.labels) == ("sequence", 1)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    want = result.model(result.params, tokens)
    assert np.abs(model(params, tokens) - want).max() < 1e-4 * np.abs(want).max()


def test_a_reward_model_of_numbers(run: Any) -> None:
    result, lines = run("scored", method="rm", reward="labels", learning_rate=1e-2, max_steps=24)
    assert evaluations(lines)[-1]["eval_mae"] < 0.3


def test_a_reward_model_trains_on(run: Any, tmp_path: Path) -> None:
    """Of a folder that has a head, the head is kept."""
    first, _ = run(
        "pairs", method="rm", tune="full", learning_rate=1e-3, output=str(tmp_path / "a")
    )
    _, lines = run("pairs", method="rm", tune="full", model=str(first.output), max_steps=1)
    assert evaluations(lines)[0]["eval_rewards/accuracies"] == 1
    with pytest.raises(mp.UserError, match="has 1 scores of each sequence; method prm trains 2"):
        run("steps", method="prm", tune="full", model=str(first.output), output=str(tmp_path / "c"))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_process_reward_model(run: Any, tune: str) -> None:
    result, lines = run("steps", method="prm", tune=tune, learning_rate=8e-3, max_steps=60)
    assert evaluations(lines)[-1]["eval_accuracy"] >= 0.9
    assert (result.model.arch.task, result.model.arch.labels) == ("token", 2)


def test_qlora_and_codes_as_reference(run: Any, tmp_path: Path) -> None:
    keys = {"quant_group": 16, "max_steps": 2, "eval_split": None}
    _, lines = run("pairs", tune="qlora", output=str(tmp_path / "q"), **keys)
    assert steps(lines)[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    keys = {"reference": "int8", "max_steps": 2, "eval_split": None, "tune": "full"}
    _, lines = run("pairs", output=str(tmp_path / "r"), **keys)
    assert 0 < abs(steps(lines)[0]["loss"] - np.log(2)) < 0.01


@pytest.mark.parametrize("keys", [{"tune": "full"}, {}, {"preference": "apo_zero_unpaired"}])
def test_a_cached_reference_is_the_reference(run: Any, tmp_path: Path, keys: Any) -> None:
    keys = keys | {"save_steps": 4, "lr_scheduler": "constant", "gradient_accumulation": 2}
    _, wanted = run("pairs", **keys, output=str(tmp_path / "a"))
    _, found = run("pairs", **keys, output=str(tmp_path / "b"), reference="cached", max_steps=4)
    files = sorted((tmp_path / "b" / "reference").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    again = {"output": str(tmp_path / "b"), "reference": "cached", "resume": True}
    _, found = run("pairs", **keys, **again)
    for line, other in zip(steps(found), steps(wanted), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert evaluations(found)[-1]["eval_loss"] == pytest.approx(
        evaluations(wanted)[-1]["eval_loss"], abs=1e-6
    )
    assert [file.stat().st_mtime_ns for file in files] == before and len(files) == 2
    with pytest.raises(mp.UserError, match=r"reference needs .* cannot be cached"):
        run("pairs", preference="kto", reference="cached")


def made(config: dict[str, Any], **keys: Any) -> tuple[Any, Any]:
    """(params, reference) of a run that begins."""
    if keys.get("tune") == "full":
        config = {name: value for name, value in config.items() if name != "lora_r"}
    read = Config.load(config | {"method": "preference"} | keys)
    mesh = make_mesh(read.mesh)
    with jax.set_mesh(mesh):
        _, params = load_params(read, mesh)
        if not method_of(read).reference:
            return params, None
        return params, reference(kept_of(read, params), *mp.partition(params))


def buffers(tree: Any) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_a_fresh_adapter_has_its_base_as_reference(config: dict[str, Any]) -> None:
    params, before = made(config)
    assert buffers(before) < buffers(params)  # no memory
    assert not any(is_weight(w) for w in jax.tree.leaves(before, is_leaf=is_weight))
    _, none = made(config, preference="simpo")
    assert none is None


def test_a_loaded_adapter_is_kept_beside_its_base(run: Any, config: dict[str, Any]) -> None:
    result, _ = run("pairs", max_steps=2, eval_split=None)
    del config["lora_r"]
    params, before = made(config, adapter=str(result.output))
    assert buffers(mp.strip_lora(params)) <= buffers(before)
    assert not buffers(mp.partition(params)[0]) & buffers(before)
    same = jax.tree.map(np.array_equal, params, before)
    assert all(jax.tree.leaves(same))


def test_where_all_weights_train_a_copy_is_kept(config: dict[str, Any]) -> None:
    params, before = made(config, tune="full")
    assert not buffers(before) & buffers(params)
    params, before = made(config, tune="full", precision="bf16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(before)} == {"bfloat16"}


def test_a_resumed_run_has_the_reference_of_its_start(run: Any, tmp_path: Path) -> None:
    keys = {"eval_split": None, "tune": "full", "save_steps": 3, "lr_scheduler": "constant"}
    _, whole = run("pairs", **keys, max_steps=6, output=str(tmp_path / "a"))
    run("pairs", **keys, max_steps=3, output=str(tmp_path / "b"))
    _, parts = run("pairs", **keys, max_steps=6, output=str(tmp_path / "b"), resume=True)
    assert [line["loss"] for line in steps(parts)] == [line["loss"] for line in steps(whole)]
