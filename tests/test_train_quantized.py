"""qlora, qat and fp8 through `train`: what is written, and that it is what was trained."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.cli import main
from mud_puppy.kernels import Quantized
from mud_puppy.weights import Scheme, is_weight, merge_quantized

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)


@pytest.fixture
def run(config, tmp_path):
    """run(**keys) -> (result, metrics lines), in float32, on a tiny model and data set."""

    def train(**keys):
        keys = {"precision": "fp32", "max_steps": 4, "eval_split": 0.2, "eval_steps": 4} | keys
        keys.setdefault("method", "lora")
        if keys["method"] == "qat" and not keys.get("qat_lora"):
            del config["lora_r"]
        result = mp.train(config | keys)
        lines = (result.output / "metrics.jsonl").read_text().splitlines()
        return result, [json.loads(line) for line in lines]

    return train


def up_proj(params):
    return params["layers"][0][0]["mlp"]["up_proj"]["weight"]


def losses(lines, name):
    return [line[name] for line in lines if name in line]


def test_qlora_trains_and_merges_with_its_adapter(run):
    result, lines = run(
        method="qlora", quant_group=16, quant_embeddings=True, learning_rate=1e-2,
        merge_lora=True, merge_precision="fp32",
    )  # fmt: skip
    weights = jax.tree.leaves(result.params, is_leaf=lambda w: isinstance(w, Quantized))
    assert {w.format for w in weights if isinstance(w, Quantized)} == {"nf4", "int8"}
    trained, merged = losses(lines, "eval_loss"), losses(lines, "eval_loss_merged_fp32")[-1]
    assert trained[-1] < trained[0]
    assert losses(lines, "eval_loss_with_its_adapter")[-1] == trained[-1]
    assert abs(merged - trained[-1]) < 1e-4
    _, base = mp.load(result.output / "merged", dtype="float32")
    model = mp.load(result.output / "merged", dtype="float32")[0]
    want = model(result.params, TOKENS)
    assert np.abs(model(base, TOKENS) - want).max() < 1e-3
    # without the adapter it would be seen
    assert np.abs(model(mp.strip_lora(result.params), TOKENS) - want).max() > 1e-2


def test_a_merged_model_in_codes(run):
    result, lines = run(
        method="qlora", quant_backend="int8", merge_lora=True, merge_precision="int8"
    )
    model, params = mp.load(result.output / "merged", dtype="float32")
    codes = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
    assert [w.format for w in codes] == 7 * ["int8"]
    loss = losses(lines, "eval_loss_merged_int8")[-1]
    assert 0 < abs(loss - losses(lines, "eval_loss_with_its_adapter")[-1]) < 0.05
    merged = model(mp.merge_lora(result.params), TOKENS)
    assert 0 < np.abs(model(params, TOKENS) - merged).max() < 0.1


def test_merged_codes_are_of_the_runs_own_groups_and_cover_all_weights(run):
    result, _ = run(
        method="qlora", quant_backend="int4", quant_group=16, quant_embeddings=True,
        lora_targets=["q_proj"], merge_lora=True, merge_precision="int4", max_steps=1,
    )  # fmt: skip
    _, params = mp.load(result.output / "merged", dtype="float32")
    codes = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
    assert sorted((w.format, w.group) for w in codes) == [*7 * [("int4", 16)], ("int8", 32)]


def test_codes_that_cannot_be_made_or_written_are_refused_before_the_run(run, monkeypatch):
    monkeypatch.setattr(importlib.import_module("mud_puppy.train"), "load_params", None)
    group, rows = {"method": "qlora", "quant_group": 16}, "_proj/weight cannot be quantized: rows"
    for keys, words in (
        ({"method": "qlora"}, rows),
        ({"merge_lora": True, "merge_precision": "int4"}, rows),
        (group | {"merge_lora": True, "merge_precision": "mxfp4"}, rows),
        (group | {"merge_lora": True, "merge_precision": "nf4"}, "not nf4 with groups of 16"),
        ({"method": "qat", "qat_format": "int4"}, "rows of (32|48)"),
    ):
        with pytest.raises(mp.UserError, match=words):
            run(**keys)


def test_the_verbs_write_codes_or_say_before_reading_weights_that_they_cannot(
    run, chat_model, tmp_path, capsys, monkeypatch
):
    result, _ = run(max_steps=2)
    out, model = str(tmp_path / "codes"), str(chat_model)
    words = ["merge", model, str(result.output), "--output", out, "--merge-precision"]
    assert main([*words, "int8"]) == 0
    codes = up_proj(mp.load(out, dtype="float32")[1]).codes
    for params, equal in ((result.params, True), (mp.strip_lora(result.params), False)):
        want = merge_quantized(params, Scheme("int8"), "bfloat16")
        assert np.array_equal(codes, up_proj(want).codes) == equal
    monkeypatch.setattr("mud_puppy.results.load", None)
    words[4] = str(tmp_path / "more")
    assert main([*words, "int4"]) == 2
    assert "_proj/weight cannot be quantized: rows of" in capsys.readouterr().err
    for flags, says in (("int4", "rows of"), ("nf4 --group 16", "nf4 with groups of 16")):
        assert main(["quantize", model, "--output", words[4], "--to", *flags.split()]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{}, {"qat_lora": True}], ids=["full", "lora"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_qat_writes_the_codes_that_were_trained(run, keys, activations):
    result, lines = run(method="qat", qat_activations=activations, learning_rate=1e-2, **keys)
    assert losses(lines, "eval_loss")[-1] < losses(lines, "eval_loss")[0]
    model, codes = mp.load(result.output / "qat_int8", dtype="float32")
    want = model(result.params, TOKENS)
    # of int8 products the last bit of a sum can move a code of an activation
    assert np.abs(model(codes, TOKENS) - want).max() < (1e-4 if activations == "none" else 2e-2)
    kind = "adapter_model.safetensors" if keys else "model.safetensors"
    assert (result.output / kind).exists()


def test_emulated_fp8_trains_beside_bf16(run):
    plain, lines = run(precision="bf16")
    rounded, other = run(precision="fp8-emulated", overwrite=True)
    a, b = losses(lines, "loss"), losses(other, "loss")
    assert a != b and np.abs(np.array(a) - b).max() < 0.05 * a[0]
    leaves = jax.tree.leaves(rounded.params, is_leaf=is_weight)
    assert any(is_weight(w) for w in leaves) and not any(type(w).__name__ == "Fp8" for w in leaves)
    assert plain.steps == rounded.steps
