"""Whatever is wrong with a GPTQ run is one line before anything is read that takes long."""

import json
import shutil

import pytest

from mud_puppy.cli import main
from tests.gptq.command_lines import command, files, verb

GROUP = "model.layers.0.mlp.down_proj: rows of 48 are no multiple of the group of 64"
NEEDS = " needs a method other than gptq"
# flags of a sound run: what the line says; none of these reads weights, which are not there
FLAGS = {
    "--gptq-group-size 64": (GROUP, "groups that fit: [16]"),
    "--gptq-bits 3": ("model.layers.0.mlp.", "GPTQ: 48 inputs do not fill", "multiple of 32"),
    "--gptq-bits 5": ("--gptq-bits: '5' is not a whole number among 2, 3, 4 and 8",),
    "--gptq-group-size 0": ("--gptq-group-size: '0' is not a whole number at least 2, or -1",),
    "--gptq-group-size -2": ("--gptq-group-size: '-2' is not a whole number at least 2, or -1",),
    "--gptq-damp-percent 1": ("--gptq-damp-percent: '1' is not a number between 0 and 1",),
    "--gptq-samples 0": ("--gptq-samples: '0' is not a whole number at least 1",),
    "--precision fp8": ("--precision: method gptq has no training products; use bf16",),
    "--learning-rate 1": ("--learning-rate: '1' has no effect: learning_rate" + NEEDS,),
    "--max-steps 2": ("max_steps" + NEEDS,),
    "--eval-steps 2 --eval-split 0.1": (
        "eval_steps needs eval_dataset or eval_split, and a method other than gptq",
    ),
    "--save-steps 2": ("save_steps" + NEEDS,),
    "--num-workers 2": ("num_workers" + NEEDS,),
    "--lora-r 2": ("lora_r needs a new adapter",),
    "--quant-backend int4": ("quant_backend needs method (or tune) qlora",),
    "--dataset nowhere.jsonl": ("nowhere.jsonl does not exist",),
    "--max-seq-length 1024 --dataset long.jsonl": ("the model has 512 positions",),
    "--dataset empty.jsonl": ("holds no rows",),
    "--resume": ("holds no run to resume",),
    "": ("no model.safetensors",),
}
# the same of the verb
VERB = {
    "--group 64": (GROUP,),
    "--bits 3": ("GPTQ: 48 inputs do not fill",),
    "--bits 5": ("--bits: '5' is not a whole number among 2, 3, 4 and 8",),
    "--group 1": ("--group: '1' is not a whole number at least 2, or -1 for a whole row",),
    "--double": ("--double: gptq has no such option",),
    "--embeddings": ("--embeddings: gptq has no such option",),
    "--dataset nowhere.jsonl": ("nowhere.jsonl does not exist",),
    "--resume": ("holds no unfinished layers to resume from",),
    "": ("no model.safetensors",),
}


@pytest.fixture
def refused(keys, tmp_path, capsys, monkeypatch):
    """Runs a command line on a model without weights; the line that it is refused with."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(keys["model"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 900}) + "\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()

    def run(argv):
        before = files(tmp_path)
        assert main(argv) == 2
        printed = capsys.readouterr()
        *_, line = printed.err.splitlines()
        assert line.startswith("mud-puppy: error: ") and printed.out == ""
        assert files(tmp_path) == before, "something was written or lost"
        return line

    return run


def without(keys, flags):
    """The run without the keys that the flags give."""
    return {key: v for key, v in keys.items() if f"--{key.replace('_', '-')}" not in flags.split()}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_runs(flags, keys, refused, tmp_path):
    keys |= {"model": str(tmp_path / "m")}
    keys |= {"output": str(tmp_path / "full")} if flags == "--resume" else {}
    line = refused(command(without(keys, flags), *flags.split()))
    assert all(part in line for part in FLAGS[flags]), line


@pytest.mark.parametrize("flags", VERB)
def test_bad_verbs(flags, keys, refused, tmp_path):
    keys |= {"model": str(tmp_path / "m")}
    keys |= {"output": str(tmp_path / "full")} if flags == "--resume" else {}
    line = refused(verb(keys, *flags.split()))
    assert all(part in line for part in VERB[flags]), line


def test_flags_of_another_format(keys, refused, tmp_path):
    run = ["quantize", str(tmp_path / "m"), "--output", str(tmp_path / "q"), "--to"]
    line = "dataset is missing: --to gptq observes the model on it; give --dataset."
    assert line in refused([*run, "gptq"])
    for flags in ("--bits 4", "--actorder", "--no-awq", "--samples 3", "--resume", "--dataset d"):
        assert f"{flags.split()[0].replace('--no-', '--')}: is of --to gptq; leave it out" in (
            refused([*run, "int8", *flags.split()])
        )
    assert "--group: -1 is of --to gptq; int4 takes a size" in refused(
        [*run, *"int4 --group -1".split()]
    )
    full = verb(keys | {"output": str(tmp_path / "full")})
    assert "full: is not empty; go on with --resume, or name another" in refused(full)


def test_a_model_in_codes_already(keys, refused, tmp_path):
    config = tmp_path / "m" / "config.json"
    fields = json.loads(config.read_text())
    codes = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(fields | codes))
    keys |= {"model": str(tmp_path / "m")}
    for argv in (command(keys), verb(keys)):
        assert "m: its weights are in codes already (config.json has a" in refused(argv)
