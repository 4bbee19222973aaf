"""What a run was: its resolved config, versions, device and git revision."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import yaml

from mud_puppy.errors import UserError

PACKAGES = (
    "mud_puppy",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
)


def run_record(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Writes config.yaml (a config to run again) and run.json into `directory`; returns the latter.

    {"started", "command", "versions", "device", "git", "config"}; a package that is not installed
    and a folder that is in no git repository are null.
    """
    plain = json.loads(json.dumps(config, default=str))
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "git": _git(),
        "config": plain,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        (directory / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write into {directory}: {error.strerror}") from error
    return record


# What may change when a run goes on, and it is still the same run.
_FREE = frozenset(
    "output resume overwrite max_steps epochs save_steps keep_checkpoints logging_steps log_with "
    "sample_prompts sample_max_new_tokens num_workers preprocess_workers trust_remote_code "
    "eval_steps early_stopping gradient_checkpointing merge_lora merge_precision mesh "
    "device_map".split()
)


def changed_keys(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """Settings that are not those of the run in `directory`, such as "seed: 0, now 1"."""
    try:
        before = yaml.safe_load((directory / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(before, dict):
        return []
    names = sorted({*before, *config} - _FREE)
    return [
        f"{name}: {before.get(name)}, now {config.get(name)}"
        for name in names
        if before.get(name) != config.get(name)
    ]


def _device() -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Revision of the repository that the process runs in, and whether tracked files differ."""
    revision = _git_says("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "dirty": bool(_git_says("status", "--porcelain", "-uno"))}


def _git_says(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
