"""Whole runs of a tiny model: what they leave, how they stop, and how they go on."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import mud_puppy as mp
from mud_puppy.cli import main
from mud_puppy.results import export_run
from mud_puppy.run.recorder import Recorder


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


ADAPTER = "adapter_model.safetensors"


def test_a_lora_run_leaves_what_it_says(config):
    config |= {
        "eval_split": 0.25,
        "eval_steps": 3,
        "merge_lora": True,
        "merge_precision": "fp32",
        "sample_prompts": 2,
        "sample_max_new_tokens": 4,
        "epochs": 50,
        "max_steps": 40,
        "logging_steps": 5,
    }
    result = mp.train(config)
    out = result.output
    assert (result.reason, result.steps) == ("done", 40)
    evals = [row["eval_loss"] for row in metrics(out) if "eval_loss" in row]
    assert metrics(out)[0]["step"] == 0 and evals[-1] < evals[0] - 0.5
    assert result.metrics["eval_loss"] == evals[-1]
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert mp.Config.load(saved) == mp.Config.load(config)
    assert json.loads((out / "run.json").read_text())["versions"]["jax"] == jax.__version__
    assert "<svg" in (out / "report.html").read_text()
    tokens = jnp.arange(12)[None]
    want = result.model(result.params, tokens)
    merged = mp.load(out / "merged", dtype="float32")
    np.testing.assert_allclose(merged[0](merged[1], tokens), want, atol=2e-5)
    model, base = mp.load(config["model"], dtype="float32")
    np.testing.assert_allclose(model(mp.load_adapter(base, out), tokens), want, atol=1e-6)
    assert np.abs(np.asarray(model(base, tokens) - want)).max() > 0.1
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast", "a name that all know"
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples["before"]) == len(samples["after"]) == 2


def test_a_full_run_is_a_model_that_loads(config):
    result = mp.train(
        {k: v for k, v in config.items() if k != "lora_r"} | {"method": "full", "max_steps": 2}
    )
    model, params = mp.load(result.output, dtype=None)
    tokens = jnp.arange(12)[None]
    want = result.model(result.params, tokens)
    np.testing.assert_allclose(model(params, tokens), want, atol=1e-6)
    assert mp.load_tokenizer(result.output).eos_token == "<|im_end|>"


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(config, tmp_path):
    config |= {"save_steps": 2, "lora_dropout": 0.1, "eval_split": 0.25}
    whole = mp.train(config)
    first = config | {"output": str(tmp_path / "parts")}
    parts = tmp_path / "parts"
    mp.train(first)
    # What a kill after step 5 leaves.
    shutil.rmtree(parts / "checkpoint-6")
    (parts / ADAPTER).unlink()
    again = mp.train(first | {"resume": True})
    assert again.steps == 6 and same(whole.output / ADAPTER, parts / ADAPTER)
    rows = [row["step"] for row in metrics(parts) if "loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]
    other = mp.train(config | {"output": str(tmp_path / "other"), "seed": 1})
    assert not same(whole.output / ADAPTER, other.output / ADAPTER)


def test_early_stopping_keeps_the_best_weights(config, tmp_path):
    config |= {
        "eval_split": 0.25,
        "eval_steps": 1,
        "early_stopping": 2,
        "learning_rate": 3.0,
        "max_steps": 30,
        "keep_checkpoints": 1,
    }
    result = mp.train(config)
    assert result.reason == "early stopping" and result.steps < 30
    evals = {row["step"]: row["eval_loss"] for row in metrics(result.output) if "eval_loss" in row}
    evals.pop(0)
    assert result.steps == min(evals, key=evals.__getitem__)
    del config["lora_r"]
    more = {"output": str(tmp_path / "more"), "adapter": str(result.output), "max_steps": 1}
    again = mp.train(config | more)
    first = next(row["eval_loss"] for row in metrics(again.output) if "eval_loss" in row)
    np.testing.assert_allclose(first, evals[result.steps], rtol=1e-5)
    assert abs(evals[max(evals)] / first - 1) > 1e-3, "the last weights are not the best"


def test_a_signal_keeps_the_last_state_not_the_best(config, monkeypatch, caplog):
    record = Recorder.__call__

    def call(self, step, values):
        record(self, step, values)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "__call__", call)
    config |= {"eval_split": 0.25, "eval_steps": 1, "early_stopping": 50, "learning_rate": 3.0}
    result = mp.train(config | {"max_steps": 30})
    evals = {row["step"]: row["eval_loss"] for row in metrics(result.output) if "eval_loss" in row}
    evals.pop(0)
    assert min(evals, key=evals.__getitem__) < 6, "or the test shows nothing"
    assert (result.reason, result.steps) == ("signal", 6)
    assert "stopped at step 6" in caplog.text


def test_other_settings_on_resume_are_said(config, caplog):
    mp.train(config | {"max_steps": 1})
    again = config | {"resume": True, "save_steps": 2}
    mp.train(again | {"max_steps": 2})
    assert "not the settings" not in caplog.text
    mp.train(again | {"max_steps": 3, "seed": 5, "lora_alpha": 8})
    assert "lora_alpha: 32.0, now 8.0; seed: 0, now 5" in caplog.text


def test_what_is_resumed_replaces_the_first_state(config, monkeypatch):
    mp.train(config | {"max_steps": 1})
    alive = []

    def fit_(step, state, *others):
        alive.append(prepared[-1].state)
        return fit(step, state, *others)

    prepared, module = [], sys.modules["mud_puppy.train"]
    make, fit = module.prepare, module.fit
    monkeypatch.setattr(module, "prepare", lambda *a: prepared.append(make(*a)) or prepared[-1])
    monkeypatch.setattr(module, "fit", fit_)
    mp.train(config | {"resume": True, "max_steps": 2})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(alive[0]))


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(config):
    out = mp.train(config | {"max_steps": 2, "save_steps": 1}).output
    mine = ["adapter_v1/weights", "checkpoint-best/x", "config.notes", "model_old.safetensors"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    mp.train(config | {"max_steps": 1, "overwrite": True})
    assert all((out / name).read_text() == "mine" for name in mine)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", mine[1][:-2]]


def test_export_of_a_checkpoint_is_the_result(config, tmp_path):
    config |= {"save_steps": 3}
    result = mp.train(config)
    export_run(result.output, tmp_path / "last")
    assert same(result.output / ADAPTER, tmp_path / "last" / ADAPTER)
    export_run(result.output, tmp_path / "third", step=3)
    assert not same(result.output / ADAPTER, tmp_path / "third" / ADAPTER)
    # A run of many devices is exported where there are few.
    text = (result.output / "config.yaml").read_text()
    (result.output / "config.yaml").write_text(text.replace("fsdp=1", "fsdp=64"))
    export_run(result.output, tmp_path / "merged", merge=True)
    model, params = mp.load(tmp_path / "merged", dtype="float32")
    tokens = jnp.arange(12)[None]
    want = result.model(result.params, tokens)
    np.testing.assert_allclose(model(params, tokens), want, atol=0.05)  # bf16 weights


def test_an_adapter_is_continued_or_stacked(config, tmp_path):
    first = mp.train(config)
    tokens = jnp.arange(12)[None]
    grown = {k: v for k, v in config.items() if k != "lora_r"} | {
        "adapter": str(first.output),
        "max_steps": 1,
        "learning_rate": 1e-9,
    }
    more = mp.train(grown | {"output": str(tmp_path / "more")})
    want = first.model(first.params, tokens)
    np.testing.assert_allclose(more.model(more.params, tokens), want, atol=1e-5)
    stacked = mp.train(
        grown | {"adapter_mode": "stack", "lora_r": 2, "output": str(tmp_path / "stacked")}
    )
    np.testing.assert_allclose(stacked.model(stacked.params, tokens), want, atol=1e-5)
    shapes = {x.shape for x in load_file(tmp_path / "stacked" / ADAPTER).values()}
    assert (6, 32) in shapes, "ranks 4 and 2 in one adapter"


def test_a_stacked_run_trains_the_new_adapter_alone(config, tmp_path):
    first = mp.train(config)
    stack = {"adapter": str(first.output), "adapter_mode": "stack", "lora_dropout": 0.5}
    config |= stack | {"output": str(tmp_path / "stacked")}
    result = mp.train(config | {"lora_targets": "q_proj"})

    def module(params, name):
        part = "mlp" if name == "up_proj" else "self_attn"
        return params["layers"][0][0][part][name]["weight"]

    for name in ("up_proj", "k_proj"):
        old, now = module(first.params, name), module(result.params, name)
        assert np.array_equal(old.a, now.a) and np.array_equal(old.b, now.b)
    assert np.abs(module(result.params, "q_proj").b).max() > 0
    with pytest.raises(mp.UserError, match="has a DoRA in a stack"):
        mp.train(config | {"lora_dora": True, "output": str(tmp_path / "dora")})
    assert not (tmp_path / "dora" / "metrics.jsonl").exists(), "refused before training"


def test_fp16_trains(config):
    result = mp.train(config | {"precision": "fp16", "max_steps": 12})
    rows = metrics(result.output)
    assert rows[0]["loss_scale"] > 1 and rows[-1]["loss"] < rows[0]["loss"]


def test_a_diverging_run_says_so(config, capsys):
    args = [config.pop("model"), config.pop("dataset")]
    flags = [x for k, v in config.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    huge = ["--learning-rate", "1e38", "--optimizer", "sgd", "--max-grad-norm", "null"]
    assert main([*args, *flags, *huge]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mud-puppy: error: the loss became ")


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "say red", "chosen": "red red", "rejected": "no"}
    path.write_text(20 * (json.dumps(row) + "\n"))
    return path


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
CONFIGS = [path for path in CONFIGS if path.stem != "gptq"]  # test_gptq_run.py


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_trains(recipe, config, pairs):
    keys = ("model", "dataset", "output", "mesh", "sample_prompts", "max_seq_length")
    changes = {key: config[key] for key in keys} | {"max_steps": 2}
    method = mp.Config.load(recipe).method
    if method == "qlora":
        changes["quant_group"] = 16  # the tiny model's rows are 32 and 48 wide
    if method in ("preference", "rm"):
        changes["dataset"] = str(pairs)
    if method == "rm":
        del changes["sample_prompts"]
    result = mp.train(mp.Config.load(recipe, changes))
    assert result.steps == 2 and result.metrics["loss"] > 0


def start(config_file, *flags):
    command = [sys.executable, "-m", "mud_puppy.train", "--config", str(config_file), *flags]
    one_device = re.sub(r"--xla_force_host\S+", "", os.environ["XLA_FLAGS"])
    env = os.environ | {"XLA_FLAGS": one_device}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def steps_seen(process) -> int:
    """Reads the log until a step was logged, or the end; the step."""
    for line in process.stderr:
        if line.startswith("step "):
            return int(line.split()[1].split("/")[0])
    return -1


def write(config, path):
    path.write_text(yaml.safe_dump(config))
    return path


def killed_and_resumed(config, tmp_path, kills):
    """The adapter of a run that was killed at random moments and resumed each time."""
    config |= {"max_steps": 60, "save_steps": 4, "eval_split": 0.2, "eval_steps": 10}
    whole = mp.train(config | {"output": str(tmp_path / "whole")})
    file = write(config, tmp_path / "config.yaml")
    chance = random.Random(0)
    for kill in range(kills):
        process = start(file, *["--resume"] * (kill > 0))
        if chance.random() < 0.9:
            steps_seen(process)
        time.sleep(chance.random() * 0.7)
        process.kill()
        process.communicate()
    process = start(file, "--resume")
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert same(whole.output / ADAPTER, tmp_path / "out" / ADAPTER)


def test_killed_and_resumed_is_bit_identical(config, tmp_path):
    killed_and_resumed(config, tmp_path, kills=2)


@pytest.mark.slow
def test_killed_ten_times_is_bit_identical(config, tmp_path):
    killed_and_resumed(config, tmp_path, kills=10)


def test_sigterm_saves_and_leaves(config, tmp_path):
    config |= {"max_steps": 5000, "save_steps": None}
    process = start(write(config, tmp_path / "config.yaml"))
    assert steps_seen(process) >= 1
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    saved = [p for p in (tmp_path / "out").glob("checkpoint-*") if p.is_dir()]
    assert len(saved) == 1 and "go on with --resume" in log
