"""GPTQ by the command line: what is written is what the function makes, a killed run goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import mud_puppy as mp
from mud_puppy.cli import main
from mud_puppy.config import DTYPES, Config
from mud_puppy.config.quantization import GPTQ_BITS
from mud_puppy.data import Example, Loader
from mud_puppy.gptq import gptq_options, observed
from mud_puppy.kernels import Quantized
from mud_puppy.run import calibrate
from mud_puppy.run.calibrate import GptqOptions, quantize_gptq
from mud_puppy.run.datasets import load_data
from mud_puppy.weights import is_weight
from mud_puppy.weights.gptq import BITS
from tests.gptq.command_lines import command, files, verb


def made(keys, options):
    """The params that the functions make of the same data."""
    config = Config.load(keys)
    dtype = DTYPES[config.precision]
    mesh = mp.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, params = mp.load(config.model, dtype, mesh)
        data = load_data(config, model, mp.load_tokenizer(config.model), 1)
        batches = observed(data.train, config.gptq_samples)
        return quantize_gptq(replace(model, dtype=dtype), params, batches, options)


def same(a, b) -> bool:
    """Whether two trees hold the same codes and numbers."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def codes_of(params):
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    return [w for w in leaves if isinstance(w, Quantized)]


OPTIONS = GptqOptions(group=16)


def test_the_command_writes_what_the_function_makes(keys, tmp_path, capsys):
    assert main(command(keys)) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "layer 1/2\n" in printed.err
    assert "layer 2/2, 00:0" in printed.err and "GPTQ: layer 1, % of the outputs" in printed.err
    out = tmp_path / "out" / "gptq"
    model, read = mp.load(out, dtype="float32")
    assert {w.format for w in codes_of(read)} == {"int4"} and len(codes_of(read)) == 7
    assert same(read, made(keys, OPTIONS))
    assert not same(read, made(keys, replace(OPTIONS, damp=0.1)))
    assert mp.generate(model, read, mp.load_tokenizer(out), ["say"], max_new_tokens=2)
    assert not (out / "unfinished").exists()
    # The verb is the same run.
    assert main(verb(keys | {"output": str(tmp_path / "q")})) == 0
    assert capsys.readouterr().out == f"quantized model: {tmp_path / 'q'}\n"
    assert files(tmp_path / "q") == files(out)


def test_precision_is_what_the_model_is_observed_in(keys, tmp_path):
    keys |= {"precision": "bf16"}
    assert main(command(keys)) == 0
    _, read = mp.load(tmp_path / "out" / "gptq", dtype="bfloat16")
    assert same(read, made(keys, OPTIONS))
    other = made(keys | {"precision": "fp32"}, OPTIONS)
    assert not same([w.codes for w in codes_of(read)], [w.codes for w in codes_of(other)])


def test_what_the_configs_say(keys, tmp_path):
    flags = "--gptq-bits 8 --no-gptq-symmetric --gptq-damp-percent 0.05 --gptq-group-size -1"
    assert main(command(keys, *flags.split(), "--no-gptq-actorder", "--gptq-awq")) == 0
    out = tmp_path / "out" / "gptq"
    told = json.loads((out / "quantize_config.json").read_text())
    assert told == json.loads((out / "config.json").read_text())["quantization_config"]
    assert told.pop("meta") == {
        "quantizer": ["mud_puppy"], "act_order": False, "awq_scales": True, "clip": True
    }  # fmt: skip
    assert told == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 8,
        "group_size": -1,
        "sym": False,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.05,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    leaves = codes_of(mp.load(out, dtype="float32")[1])
    assert all(w.format == "int8" and w.scales.shape[-1] == 1 for w in leaves)
    # config.yaml is the run again.
    config = Config.load(tmp_path / "out" / "config.yaml")
    assert (config.gptq_group_size, config.gptq_awq, config.seed) == (-1, True, 0)
    assert "learning_rate" not in yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["gptq_bits"] == 8
    assert gptq_options(config) == GptqOptions(
        bits=8, group="row", symmetric=False, act_order=False, damp=0.05, awq=True
    )


def test_the_config_has_the_options_defaults():
    config = Config.load({"model": "m", "dataset": "d", "output": "o", "method": "gptq"})
    assert gptq_options(config) == GptqOptions()
    assert [bits for bits in range(12) if GPTQ_BITS.test(bits)] == list(BITS)


class Killed(BaseException):
    """As a signal would: nobody catches it."""


@pytest.fixture
def killed(monkeypatch):
    """killed(argv): runs it until its second layer; blocks that are made are counted."""
    whole, count = calibrate.quantize_block, []

    def run(argv):
        def once(*args):
            if args[-1] == 1:
                raise Killed
            return whole(*args)

        monkeypatch.setattr(calibrate, "quantize_block", once)
        with pytest.raises(Killed):
            main(argv)
        monkeypatch.setattr(
            calibrate, "quantize_block", lambda *a: count.append(a[-1]) or whole(*a)
        )
        return count

    return run


@pytest.mark.parametrize("form", [command, verb])
def test_a_killed_run_goes_on_to_the_same_files(form, keys, killed, tmp_path, capsys):
    assert main(form(keys | {"output": str(tmp_path / "whole")})) == 0
    whole, out = tmp_path / "whole", tmp_path / "out"
    if form is command:
        whole, out = whole / "gptq", out / "gptq"
    made = killed(form(keys))
    held = files(tmp_path / "out")
    assert {p.name for p in out.rglob("*.safetensors")} == {"layer-00000.safetensors"}
    capsys.readouterr()
    assert main(form(keys)) == 2
    assert "is not empty; go on with --resume" in capsys.readouterr().err
    other = "--gptq-bits" if form is command else "--bits"
    assert main(form(keys, "--resume", other, "8")) == 2
    line = {command: "gptq_bits: 4, now 8", verb: "layers of other options, data or model: options"}
    assert line[form] in capsys.readouterr().err
    assert main(form(keys | {"precision": "bf16"}, "--resume")) == 2
    line = {command: "precision: fp32, now bf16", verb: "options, data or model: dtype"}
    assert line[form] in capsys.readouterr().err
    assert files(tmp_path / "out") == held
    damaged = shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    assert main(form(keys, "--resume")) == 0
    assert made == [1]  # the first layer was read
    printed = capsys.readouterr().err
    assert "1 of 2 layers are there already" in printed
    assert "layer 2/2\n" in printed and "layer 1/2" not in printed
    assert files(out) == files(whole)
    # All is done: there is nothing to go on from, and nothing is lost.
    assert main(form(keys, "--resume")) == 2
    assert "holds no unfinished layers" in capsys.readouterr().err
    assert files(out) == files(whole)
    # What is in the file is what is used: with other codes in it the result is another.
    (layer,) = damaged.rglob("layer-00000.safetensors")
    other_codes(layer)
    assert main(form(keys | {"output": str(damaged)}, "--resume")) == 0
    assert (
        files(damaged / out.relative_to(tmp_path / "out"))["model.safetensors"]
        != files(whole)["model.safetensors"]
    )


def other_codes(path):
    with safe_open(path, framework="numpy") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "mlp/up_proj/weight#codes"
    save_file(tensors | {name: tensors[name] ^ 1}, path, metadata=told)


def test_overwrite_replaces_what_the_run_wrote_alone(keys, tmp_path):
    assert main(command(keys)) == 0
    (tmp_path / "out" / "mine.txt").touch()
    assert main(command(keys, "--overwrite", "--gptq-damp-percent", "0.1")) == 0
    out = tmp_path / "out"
    assert json.loads((out / "gptq" / "quantize_config.json").read_text())["damp_percent"] == 0.1
    assert Config.load(out / "config.yaml").gptq_damp_percent == 0.1 and (out / "mine.txt").exists()


def test_an_evaluation_set_is_measured(keys):
    result = mp.train(keys | {"eval_split": 0.2})
    found = result.metrics
    assert (result.steps, result.reason) == (0, "done")
    assert 0 < found["eval_kl"] < 0.1
    assert found["eval_perplexity"] != found["eval_perplexity_original"]
    # Against the plain sums over the held-out rows.
    config = Config.load(keys | {"eval_split": 0.2})
    model, params = mp.load(config.model, dtype="float32")
    held = load_data(config, model, mp.load_tokenizer(config.model), 1).evaluation
    for name, weights in {"eval_loss_original": params, "eval_loss": result.params}.items():
        assert abs(mean_loss(model, weights, held) - found[name]) < 1e-5
    assert abs(found["eval_loss"] - found["eval_loss_original"]) > 1e-4
    assert abs(np.exp(found["eval_loss"]) - found["eval_perplexity"]) < 1e-3


def test_there_is_no_checkpoint_to_export(keys, tmp_path, capsys):
    out = mp.train(keys | {"gptq_samples": 2}).output
    assert main(["export", str(out), "--output", str(tmp_path / "e")]) == 2
    assert "its model is in gptq/" in capsys.readouterr().err


def test_the_recipe_runs(keys):
    recipe = Path(__file__).parents[2] / "configs" / "gptq.yaml"
    changes = {name: v for name, v in keys.items() if name not in ("precision", "gptq_samples")}
    result = mp.train(Config.load(recipe, changes))
    assert result.metrics["eval_kl"] > 0 and len(codes_of(result.params)) == 7


def mean_loss(model, params, held):
    total = count = 0.0
    for step in range(held.steps_per_epoch):
        b = {name: jnp.asarray(array[0]) for name, array in held.batch_at(step).items()}
        logits = model(params, b["tokens"], b["positions"], b["segment_ids"])
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), b["targets"][..., None], -1)[..., 0]
        total -= float(jnp.where(b["weights"] > 0, logps, 0).sum())
        count += float(b["weights"].sum())
    return total / count


def test_rows_are_drawn_by_seed_and_the_rest_is_padding():
    def loader(seed):
        lines = [np.full(64, i + 1, np.int32) for i in range(20)]
        ones = np.ones(64, np.float32)
        made = [Example(x, ones, str(i)) for i, x in enumerate(lines)]
        return Loader(made, 4, max_seq_length=64, seed=seed)

    def rows(seed, samples):
        batches = observed(loader(seed), samples)
        assert {batch["tokens"].shape for batch in batches} == {(1, 4, 64)}
        tokens = np.concatenate([batch["tokens"][0] for batch in batches])
        segments = np.concatenate([batch["segment_ids"][0] for batch in batches])
        assert (segments[:samples] == 1).all() and not segments[samples:].any()
        return tokens[:samples, 0].tolist()

    assert rows(0, 6) == rows(0, 8)[:6]
    assert len(set(rows(0, 20))) == 20 and len(observed(loader(0), 99)) == 5
    assert rows(0, 6) != rows(1, 6)
