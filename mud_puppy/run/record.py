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
