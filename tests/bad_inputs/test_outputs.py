"""Output folders that cannot be written, or hold what must not be lost; and a full disk."""

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mud_puppy.cli import main
from tests.bad_inputs.bench import Bench, assert_one_line
from tests.bad_inputs.damage import TENSORS


def below_a_file(bench: Bench) -> list[str]:
    return bench.train(output=bench.data / "out")


def a_long_name(bench: Bench) -> list[str]:
    return bench.train(output=bench.root / ("x" * 300))


def somebody_elses_folder(bench: Bench) -> list[str]:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("mine")
    return bench.train("--resume")


def overwritten_model(bench: Bench) -> list[str]:
    return bench.train("--overwrite", output=bench.model)


def overwritten_base(bench: Bench) -> list[str]:
    shutil.move(bench.model, bench.run / "merged")
    return bench.train("--overwrite", model=bench.run / "merged", output=bench.run)


def overwritten_adapter(bench: Bench) -> list[str]:
    return bench.train("--overwrite", "--adapter", str(bench.run), output=bench.run)


def overwritten_by_a_bad_run(bench: Bench) -> list[str]:
    (bench.model / TENSORS).write_bytes(b"")
    return bench.train("--overwrite", output=bench.run)


# name: (command line, what the line says)
OUTPUT: dict[str, tuple[Callable[[Bench], list[Any]], tuple[str, ...]]] = {
    "a file": (lambda b: b.train(output=b.data), ("d.jsonl: is a file; name a folder",)),
    "below a file": (below_a_file, ("d.jsonl/out: cannot be written", "name another folder")),
    "/proc": (lambda b: b.train(output="/proc/out"), ("output /proc/out: cannot be written",)),
    "name too long": (a_long_name, ("cannot be written (File name too long)",)),
    "not empty": (
        lambda b: b.train(output=b.run),
        ("run: is not empty", "--resume", "--overwrite", "name another folder"),
    ),
    "resume somebody else's": (
        somebody_elses_folder,
        ("holds no run to resume", "thesis.tex", "name the run's folder"),
    ),
    "overwrite the model": (overwritten_model, ("m: lies in the output folder", "name another")),
    "overwrite the base": (overwritten_base, ("merged: lies in the output folder",)),
    "overwrite the adapter": (overwritten_adapter, ("adapter", "run: lies in the output folder")),
    "overwrite for nothing": (overwritten_by_a_bad_run, ("not a whole safetensors file",)),
    "resume with another rank": (
        lambda b: b.train("--resume", "--lora-r", "8", output=b.run),
        ("checkpoint-2 does not fit this run", "float32[2,4,48]", "Resume with the model"),
    ),
    "resume with another method": (
        lambda b: b.train("--resume", "--method", "full", output=b.run),
        ("checkpoint-2 does not fit this run: train/embed is absent in the checkpoint",),
    ),
    "merge into the model": (
        lambda b: ["merge", b.model, b.run, "--output", b.model],
        ("m: is not empty; name another folder",),
    ),
    "export into the run": (
        lambda b: ["export", b.run, "--output", b.run],
        ("run: is not empty; name another folder",),
    ),
}


@pytest.mark.parametrize(("argv", "says"), OUTPUT.values(), ids=list(OUTPUT))
def test_outputs(argv, says, bench, refused):
    refused(argv(bench), *says)


def test_resume_of_damaged_checkpoints_and_samples(bench, refused):
    argv = bench.train("--resume", "--lora-r", "4", output=bench.run)
    (bench.run / "samples.json").write_text("[")
    refused(argv, "samples.json: not readable as JSON", "remove the file")
    (bench.run / "checkpoint-2" / "meta.json").write_text("{")
    refused(argv, "checkpoint-2 is damaged: meta.json is not what was written")


def test_full_disk(bench, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert main(bench.train()) == 2
    says = "out/checkpoint-2: No space left on device; there is no earlier one"
    assert_one_line(capsys.readouterr().err, (says,))
    assert not list(bench.out.glob("checkpoint-*"))
