"""What the ends of quantized runs write, measure and refuse, where methods meet each other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.cli import main
from mud_puppy.export import save_hf, save_quantized
from mud_puppy.model.gptq_format import quantization_config
from mud_puppy.model.quantized_files import gptq_writer
from mud_puppy.weights import FakeQuant, is_weight
from tests.tiny import tiny_model

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)


@pytest.fixture
def untied(config, tmp_path):
    """The config of a run on the tiny model with a head of its own."""
    model, _ = mp.abstract(config["model"])
    fields = json.loads(model.arch.config) | {"tie_word_embeddings": False}
    model, params = tiny_model(**fields)
    save_hf(model, params, tmp_path / "untied", "float32", mp.load_tokenizer(config["model"]))
    return config | {"model": str(tmp_path / "untied"), "max_steps": 2}


def test_adapters_beside_the_grid_are_merged_into_what_qat_writes(untied):
    keys = {
        "method": "qat",
        "qat_lora": True,
        "lora_targets": ["lm_head", "embed_tokens", "q_proj"],
    }
    result = mp.train(untied | keys | {"learning_rate": 0.1})
    model, codes = mp.load(result.output / "qat_int8", dtype="float32")
    want = model(result.params, TOKENS)
    assert np.abs(model(codes, TOKENS) - want).max() < 0.05  # embedding and head are in bfloat16
    assert np.abs(model(mp.load(untied["model"])[1], TOKENS) - want).max() > 0.5
    assert (result.output / "adapter_model.safetensors").exists()


def test_a_qat_run_merged_in_its_own_format_is_what_was_trained(config):
    keys = {"method": "qat", "qat_format": "int4", "qat_group": 16, "qat_lora": True}
    keys |= {"qat_ranges": "learned", "merge_lora": True, "merge_precision": "int4"}
    out = mp.train(config | keys | {"eval_split": 0.2, "max_steps": 3}).output
    sizes = {(out / n / "model.safetensors").read_bytes() for n in ("qat_int4", "merged")}
    assert len(sizes) == 1
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss_merged_int4"] == pytest.approx(last["eval_loss_with_its_adapter"], 1e-4)
    assert last["eval_loss_merged_bf16"] != pytest.approx(last["eval_loss_with_its_adapter"], 1e-4)


def test_before_a_merge_is_as_it_trained_with_float8_products(config):
    out = mp.train(
        config | {"precision": "fp8-emulated", "merge_lora": True, "eval_split": 0.2}
    ).output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    assert lines[-1]["eval_loss_with_its_adapter"] == trained != lines[-1]["eval_loss_merged_bf16"]


def test_codes_of_other_bits_or_groups_are_not_written_as_gptq(tmp_path):
    model, params = tiny_model()
    for codes, bits, group, words in (
        (mp.quantize(params, "int4", group=16), 8, 16, "int4 codes, not codes of 8 bits"),
        (mp.quantize(params, "int8", group=16), 4, 16, "int8 codes, not codes of 4 bits"),
        (mp.quantize(params, "int4", group=16), 4, 8, "groups of 16, where .* group_size is 8"),
    ):
        layout = gptq_writer(quantization_config(bits, group, True, True, 0.01))
        with pytest.raises(mp.UserError, match=words):
            save_quantized(model, codes, tmp_path / "q", layout=layout)


def test_a_model_in_codes_is_refused_before_its_weights_are_read(config, chats, tmp_path, capsys):
    where = str(tmp_path / "int8")
    assert main(["quantize", config["model"], "--to", "int8", "--output", where]) == 0
    (tmp_path / "int8" / "model.safetensors").unlink()
    run = ["--model", where, "--dataset", str(chats), "--output", str(tmp_path / "o")]
    for flags, words in {
        "--method full": "which do not train",
        "--method qat": "which do not train",
        "--method qlora": "already: use method lora (or quant_backend stored)",
    }.items():
        assert main([*run, *flags.split()]) == 2
        told = capsys.readouterr().err
        assert "are in codes (compressed-tensors)" in told and words in told
    assert main(["eval", where, "--dataset", str(chats), "--against", "nf4"]) == 2
    assert "nf4 is made of a model in floats" in capsys.readouterr().err
    float8 = "--method qlora --quant-backend fp8 --quant-group 16 --precision fp8-emulated"
    assert main([*run, *float8.split()]) == 2
    assert "--quant-group: float8 products take one scale a row" in capsys.readouterr().err


def test_the_functions_look_under_the_grid(tmp_path):
    model, params = tiny_model()
    grid = mp.fake_quant(mp.add_lora(params, 2, key=jax.random.key(0)), "int8")
    assert any(isinstance(w, FakeQuant) for w in jax.tree.leaves(grid, is_leaf=is_weight))
    with pytest.raises(mp.UserError, match="these params have adapters"):
        mp.save_hf(model, grid, tmp_path / "m")
    mp.save_adapter(model, grid, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    dynamic = mp.fake_quant(params, "int8", activations="int8")
    with pytest.raises(mp.UserError, match=r"_proj' is a Int8Dynamic"):
        mp.weights.fp8(mp.weights.finish_fake_quant(dynamic), emulated=True)


def test_codes_do_not_train():
    model, params = tiny_model()
    train, frozen = mp.partition(mp.quantize(params, "int8"))

    def loss(train):
        return model(mp.weights.combine(train, frozen), TOKENS).var()

    grads = jax.grad(loss)(train)
    assert grads["embed"].any() and len(jax.tree.leaves(grads)) == 5  # head and norms too
