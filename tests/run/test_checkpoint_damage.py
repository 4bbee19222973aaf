"""Checkpoints that are damaged, that a disk does not take, whose writer is killed: never silently
wrong."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.run.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]


def small(step: int) -> dict:
    return {"w": jnp.full((4, 4), step, jnp.float32), "step": step}


def two_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints 1 and 2; returns the files of 2."""
    store = Checkpoints(directory)
    for step in (1, 2):
        store.save(step, small(step) | {"key": jax.random.key(step)}, {"note": "x" * 50})
    store.wait()
    return sorted(p for p in (directory / "checkpoint-2").rglob("*") if p.is_file())


TARGET = small(0) | {"key": jax.random.key(0)}


def test_any_flipped_bit_or_lost_byte_is_found_and_the_previous_used(tmp_path, caplog):
    files = two_checkpoints(tmp_path)
    assert len(files) > 8
    rng = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), whole[:-1], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            caplog.clear()
            got = Checkpoints(tmp_path).restore(TARGET)
            assert got.step == got.state["step"] == 1, (file, damaged)
            assert "checkpoint-2 is damaged: " in caplog.text
            assert "checkpoint-1 is used instead" in caplog.text
        file.write_bytes(whole)
    caplog.clear()
    assert Checkpoints(tmp_path).restore(TARGET).step == 2  # whole again
    assert not caplog.text


def test_no_undamaged_checkpoint_is_an_error_that_names_all(tmp_path):
    two_checkpoints(tmp_path)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"-2 is damaged: meta.json .*-1 is damaged: meta.json"):
        Checkpoints(tmp_path).restore(TARGET)


def test_a_named_step_is_not_replaced_by_another(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "checkpoint-2" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"there are checkpoints of steps 1$"):
        Checkpoints(tmp_path).restore(TARGET, step=2)
    with pytest.raises(UserError, match=r"checkpoint-3 does not exist; .* steps 1, 2"):
        Checkpoints(tmp_path).restore(TARGET, step=3)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "checkpoint-2" / "meta.json").write_text("{}")
    store = Checkpoints(tmp_path, keep=1)
    assert store.restore(TARGET).step == 1
    store.save(2, TARGET)
    store.wait()
    assert store.steps() == [2]
    assert Checkpoints(tmp_path).restore(TARGET).step == 2


def test_sums_read_as_sha256sum_writes_them(tmp_path):
    two_checkpoints(tmp_path)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "checkpoint-2").returncode == 0


# --- a disk that does not take it -----------------------------------------------------------------

FULL = """
import resource, sys
import jax.numpy as jnp
from mud_puppy.errors import UserError
from mud_puppy.run.checkpoint import Checkpoints

store = Checkpoints(sys.argv[1])
store.save(1, {"x": jnp.arange(8.0)})
store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
for call in ("save", "latest", "wait"):
    store.save(2, {"x": jnp.arange(1 << 20)})  # returns: the write fails in the background
    try:
        {"save": lambda: store.save(3, {"x": jnp.zeros(1)}), "latest": store.latest,
         "wait": store.wait}[call]()
    except UserError as error:
        print(error)
print(store.restore({"x": jnp.zeros(8)}).step, store.steps())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.save(2, {"x": jnp.zeros(8)})  # there is space again
print(store.latest())
"""


def python(code: str, *args: str, **options: Any) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_write_that_fails_is_one_clear_line_and_leaves_the_previous(tmp_path):
    out, err = python(FULL, str(tmp_path)).communicate(timeout=60)
    line = (
        f"cannot write checkpoint {tmp_path}/checkpoint-2: File too large; checkpoint-1 is intact"
    )
    assert out.splitlines() == [line] * 3 + ["1 [1]", "2"], (out, err)
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(directory: Path) -> None:
        raise OSError(28, "No space left on device", str(directory))

    store = Checkpoints(tmp_path)
    monkeypatch.setattr("mud_puppy.run.checksums.seal", full)
    store.save(4, small(4))
    with pytest.raises(UserError, match=r"-4: No space left on device; there is no earlier one$"):
        store.latest()
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*: (File exists|Not a dir)"):
        Checkpoints(tmp_path / "out").save(1, small(1))


# --- killed ---------------------------------------------------------------------------------------

ENDLESS = """
import itertools, os, signal, sys
import jax.numpy as jnp
from mud_puppy.run.checkpoint import Checkpoints

doom, left = sys.argv[2], int(sys.argv[3])  # the left-th event of this name from now kills

def strike(event, args):
    global left
    if event == doom:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

store = Checkpoints(sys.argv[1], keep=1)
start = store.latest()
if start is not None:
    start = store.restore({"x": jnp.zeros(50_000), "step": 0}).step
sys.addaudithook(strike)
for step in itertools.count((start or 0) + 1):
    store.save(step, {"x": jnp.full(50_000, float(step)), "step": step})
    print(step, flush=True)
"""


def test_killed_at_any_moment_leaves_a_usable_checkpoint_and_no_partial_one(tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    rng = random.Random(seed)
    newest = 0
    renames, removals = rng.randrange(2, 12), rng.randrange(2, 60)
    moments = [("", -1)] * 3 + [("os.rename", renames), ("os.remove", removals)]
    for event, count in moments:
        child = python(ENDLESS, str(tmp_path), event, str(count))
        assert child.stdout is not None
        # It has begun to save; nothing is said when it dies before its first save returns.
        seen = int(child.stdout.readline() or newest + 1)
        if not event:
            time.sleep(rng.uniform(0, 0.15))
            child.kill()
        rest, err = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, err
        seen = [seen, *map(int, rest.split())][-1]  # `seen - 1` was complete when `seen` began
        store = Checkpoints(tmp_path, keep=1)
        steps = store.steps()
        assert newest <= seen - 1 and (not steps or seen - 1 <= steps[-1] <= seen)
        for step in steps:  # all that has the name is whole, also while an old one was removed
            got = store.restore({"x": jnp.zeros(50_000), "step": 0}, step)
            assert got.state["step"] == step and (np.asarray(got.state["x"]) == step).all()
        assert steps or seen == 1
        newest = max(steps, default=0)
    store.save(newest + 1, small(newest + 1))
    assert store.latest() == newest + 1
    assert not list(tmp_path.glob("*.tmp"))
