"""Command lines of every verb: what they name is missing, swapped or of another kind."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from safetensors.numpy import load_file

from mud_puppy.cli import main
from tests.bad_inputs.bench import Bench, assert_one_line, files
from tests.bad_inputs.damage import ADAPTER, Q

# name: (command line, what the line says)
COMMANDS: dict[str, tuple[Callable[[Bench], list[Any]], tuple[str, ...]]] = {
    "missing model": (
        lambda b: b.train(model=b.root / "n"),
        ("/n: no such model folder or file; check the path",),
    ),
    "model and data swapped": (
        lambda b: b.train(model=b.data, dataset=b.model),
        ("d.jsonl: a model is a folder, a .gguf file or a hub id, not this file",),
    ),
    "GGUF": (
        lambda b: b.train(model=Path(shutil.copy(b.data, b.root / "m.gguf"))),
        ("m.gguf: not a whole GGUF file", "copy or download it again"),
    ),
    "missing data": (
        lambda b: b.train(dataset=b.root / "data" / "d.jsonl"),
        ("data/d.jsonl does not exist; check the path",),
    ),
    "missing data, near": (
        lambda b: b.train(dataset=b.root / "d.json"),
        ("d.json does not exist", "Did you mean 'd.jsonl'?"),
    ),
    "data is a folder": (
        lambda b: b.train(dataset=b.model),
        ("m is a folder; name the data file in it",),
    ),
    "empty prompt": (
        lambda b: ["generate", b.model, "--prompt", ""],
        ("--prompt: [''] is not a non-empty text",),
    ),
    "prompt of bytes": (
        lambda b: ["generate", b.model, "--prompt", "\udcff"],
        ("--prompt: ['\\udcff'] is not a non-empty text",),
    ),
    "long prompt": (
        lambda b: ["generate", b.model, "--prompt", "x" * 600],
        ("prompt 0 has 6", "the 512 positions of the model: shorten it"),
    ),
    "no prompt": (lambda b: ["generate", b.model], ("prompt is missing: give --prompt",)),
    "generate with a run": (
        lambda b: ["generate", b.run, "--prompt", "x"],
        ("run: a PEFT adapter, not a model",),
    ),
    "merge without adapter": (
        lambda b: ["merge", b.model, b.root / "rum", "--output", b.out],
        ("rum: no such adapter folder", "Did you mean 'run'?"),
    ),
    "merge, swapped": (
        lambda b: ["merge", b.run, b.model, "--output", b.out],
        ("run: a PEFT adapter, not a model",),
    ),
    "export of no run": (
        lambda b: ["export", b.model, "--output", b.out],
        ("m: no run is here (there is no config.yaml)",),
    ),
    "export of no step": (
        lambda b: ["export", b.run, "--output", b.out, "--step", "77"],
        ("checkpoint-77 does not exist; there are checkpoints of steps 2",),
    ),
    "preview of nothing": (
        lambda b: ["preview", b.root / "d.json", "--model", b.model],
        ("d.json does not exist", "Did you mean 'd.jsonl'?"),
    ),
    "misspelt verb": (
        lambda b: ["generat", b.model, "--prompt", "x"],
        ("unknown flag --prompt. Did you mean 'generate'?",),
    ),
    "train is no verb": (
        lambda b: ["train", b.model, b.data, "--output", b.out],
        ("train is no verb: leave the word out",),
    ),
}


@pytest.mark.parametrize(("argv", "says"), COMMANDS.values(), ids=list(COMMANDS))
def test_commands(argv, says, bench, refused):
    refused(argv(bench), *says)


def test_chat_needs_a_template(bench, refused):
    (bench.model / "chat_template.jinja").unlink()
    refused(["chat", bench.model], "the tokenizer has no chat template; use generate")


def test_out_of_memory(bench, refused, monkeypatch):
    def fill(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(sys.modules["mud_puppy.train"], "prepare", fill)
    refused(bench.train(), "out of memory: lower batch_size")

    def bug(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(sys.modules["mud_puppy.train"], "prepare", bug)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main(bench.train())


def test_what_is_sound_is_not_refused(bench, capsys):
    """The partner of every case of this folder: the same command line, with nothing damaged."""
    (bench.run / "mine.txt").write_text("not the run's")
    seed = str(10**30)
    assert main(bench.train("--overwrite", "--seed", seed, output=bench.run, lora_r=2)) == 0
    assert load_file(bench.run / ADAPTER)[f"{Q}.lora_A.weight"].shape == (2, 32)
    assert (bench.run / "mine.txt").exists()
    capsys.readouterr()
    assert main(bench.train("--resume")) == 0
    assert "has no checkpoint yet: the run starts at step 0" in capsys.readouterr().err


PROCESSES = {
    "mud_puppy": (lambda b: ["--lora-rr", "1"], "unknown flag --lora-rr. Did you mean '--lora-r'?"),
    "mud_puppy.train": (
        lambda b: ["--config", str(b.root / "c.yaml")],
        "c.yaml:4: lora_rank: unknown key. Did you mean",
    ),
    "mud_puppy.__main__": (lambda b: b.train(model=b.root / "no"), "no such model folder or file"),
}


@pytest.mark.parametrize("module", PROCESSES)
def test_processes(module, bench):
    keys = {"model": "m", "dataset": "d", "output": str(bench.out), "lora_rank": 3}
    (bench.root / "c.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    argv, says = PROCESSES[module]
    before = files(bench.root)
    command = [sys.executable, "-m", module, *argv(bench)]
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, (says,))
    assert files(bench.root) == before
