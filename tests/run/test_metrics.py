"""Contract of run/metrics.py and run/record.py."""

import json
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event

from mud_puppy.errors import UserError
from mud_puppy.run import metrics
from mud_puppy.run.metrics import JsonLines, open_metrics, read_metrics
from mud_puppy.run.record import run_record


def test_lines_are_on_the_disk_as_they_are_written(tmp_path):
    writer = open_metrics(tmp_path / "new")
    path = tmp_path / "new" / "metrics.jsonl"
    for step in (1, 2):
        writer.write(step, {"loss": jnp.float32(0.5), "tokens": 7, "rate": np.float64(1 / 3)})
        assert len(path.read_text().splitlines()) == step
    assert read_metrics(path)[1] == {"step": 2, "loss": 0.5, "tokens": 7, "rate": 1 / 3}
    writer.close()


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    writer = JsonLines(tmp_path / "m.jsonl")
    writer.write(1, {"a": float("nan"), "b": jnp.float32(jnp.inf), "c": -np.inf, "d": 0.0})
    writer.close()

    def no_constants(word: str) -> None:
        raise AssertionError(word)

    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=no_constants)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 0.0}


def killed_run(path: Path) -> None:
    writer = JsonLines(path)
    for step in range(1, 8):
        writer.write(step, {"loss": 10.0 - step})
        if step % 2 == 0:
            writer.write(step, {"eval_loss": 20.0 - step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # SIGKILL in the middle of a line


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    killed_run(path)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    writer = JsonLines(path, resume_step=4)
    writer.write(5, {"loss": -5.0})
    writer.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5]
    assert rows[5:] == [{"step": 4, "eval_loss": 16.0}, {"step": 5, "loss": -5.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_afresh_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    killed_run(path)
    JsonLines(path).close()
    assert read_metrics(path) == []


def test_resuming_without_a_file_is_fine(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
    JsonLines(tmp_path / "metrics.jsonl", resume_step=4).close()


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in ("{", "[]", '{"loss": 1}', "\x00"):
        path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl:2: not a line of metrics"):
            read_metrics(path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl"):
        open_metrics(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write into"):
        run_record(tmp_path / "file", {})


def test_a_full_disk_is_one_line(tmp_path):
    writer = JsonLines(tmp_path / "m.jsonl")
    writer.close()
    with (
        Path("/dev/full").open("ab", buffering=0) as writer._file,
        pytest.raises(UserError, match=r"m.jsonl: No space left on device"),
    ):
        writer.write(1, {"loss": 1.0})


def events(directory: Path) -> list[Event]:
    """All events of a TensorBoard folder: length, checksum, event, checksum, and again."""
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_has_the_numbers_and_drops_later_steps_on_resume(tmp_path):
    writer = open_metrics(tmp_path, "tensorboard")
    writer.write(3, {"loss": 0.5, "nan": float("nan")})
    writer.close()
    scalars = [
        (e.step, v.tag, v.simple_value)
        for e in events(tmp_path / "tensorboard")
        for v in e.summary.value
    ]
    assert (3, "loss", 0.5) in scalars
    open_metrics(tmp_path, "tensorboard", resume_step=2).close()
    restarts = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status]
    assert restarts == [3]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 0


class FakeRun:
    def __init__(self) -> None:
        self.rows: list = []

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.rows.append("finished")


def fake_wandb(monkeypatch, has_key: bool) -> list[tuple[dict, FakeRun]]:
    """Stands for the wandb package and collects (arguments of init, run)."""
    runs = []

    def init(**options):
        runs.append((options, FakeRun()))
        return runs[-1][1]

    module = types.ModuleType("wandb")
    module.init, module.login = init, lambda prompt, verify: has_key
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs


def test_wandb_is_offline_without_a_key_and_resumes_under_its_id(tmp_path, monkeypatch):
    runs = fake_wandb(monkeypatch, has_key=False)
    for resume_step in (None, 1, None):
        writer = open_metrics(tmp_path / "out", "wandb", resume_step, {"rank": 8})
        writer.write(2, {"loss": np.float32(0.5)})
        writer.close()
    options, run = runs[0]
    assert run.rows == [(2, {"loss": 0.5}), "finished"]
    assert (options["mode"], options["name"], options["config"]) == ("offline", "out", {"rank": 8})
    assert options["dir"] == str(tmp_path / "out")
    first, resumed, fresh = [options["id"] for options, _ in runs]
    assert first == resumed != fresh


@pytest.mark.parametrize(("mode", "expected"), [(None, "online"), ("disabled", "disabled")])
def test_wandb_goes_online_with_a_key_unless_told_otherwise(tmp_path, monkeypatch, mode, expected):
    runs = fake_wandb(monkeypatch, has_key=True)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    open_metrics(tmp_path, "wandb").close()
    assert runs[0][0]["mode"] == expected


@pytest.mark.parametrize(
    ("choice", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch, choice, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install 'mud_puppy\[{choice}\]'"):
        open_metrics(tmp_path, choice)


def test_an_unknown_choice_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
        open_metrics(tmp_path, "tensorbord")
    assert "none" in metrics.LOG_WITH


def test_run_record_holds_config_versions_device_and_revision(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(repo)]
    subprocess.run(["git", "init", "-q", str(repo)], check=True)
    (repo / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    monkeypatch.chdir(repo)
    config = {"model": "m", "output": Path("out"), "lora": {"rank": 8, "targets": ("q", "v")}}
    record = run_record(tmp_path / "out", config)
    assert record == json.loads((tmp_path / "out" / "run.json").read_text())
    plain = {"model": "m", "output": "out", "lora": {"rank": 8, "targets": ["q", "v"]}}
    assert record["config"] == plain
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text()) == plain
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["python"].startswith("3.")
    assert {
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "numpy",
        "mud_puppy",
    } < set(record["versions"])
    assert (record["device"]["backend"], record["device"]["count"]) == ("cpu", 8)
    assert len(record["git"]["revision"]) == 40 and record["git"]["dirty"] is False
    (repo / "file").write_text("2")
    assert run_record(tmp_path / "out", config)["git"]["dirty"] is True


@pytest.mark.parametrize("path", [None, ""])
def test_run_record_without_a_repository_or_without_git(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    assert run_record(tmp_path, {})["git"] is None
