"""Runs `probe` in a process of its own: whatever a driver does to it becomes a line of text."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 300.0  # compiling some twenty kernels takes half a minute
LAST = 6  # lines that are quoted of a process that died


@dataclass(frozen=True)
class Device:
    platform: str  # "cpu", "cuda", "rocm"
    arch: str  # "cpu", "sm90", "gfx1100"
    kind: str
    memory_bytes: int  # that JAX may use; 0 where it does not say


@dataclass(frozen=True)
class Check:
    """One thing tried. kind: "kernel", "pinned_host", "offload", "all-reduce" or "matmul"."""

    kind: str
    name: str
    problem: str | None
    note: str = ""


@dataclass(frozen=True)
class Probe:
    """crash: how the process ended, empty where it came to its end; doing: what it was at then;
    said: what JAX and the drivers wrote, its last lines."""

    devices: tuple[Device, ...] = ()
    checks: tuple[Check, ...] = ()
    crash: str = ""
    doing: str = ""
    said: tuple[str, ...] = field(default=())

    @property
    def on_gpu(self) -> bool:
        return any(d.platform != "cpu" for d in self.devices)

    def of(self, kind: str) -> list[Check]:
        return [check for check in self.checks if check.kind == kind]


def probe(timeout_s: float = TIMEOUT_S, command: Iterable[str] = ()) -> Probe:
    """Tries this machine's devices. command: what to run instead, for tests."""
    words = list(command) or [sys.executable, "-m", "mud_puppy.doctor.probe"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
        crash = _ending(process.returncode)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        crash = f"it took longer than {timeout_s:g} s"
    return _read(out.decode(errors="replace"), crash, _last_words(err.decode(errors="replace")))


def _ending(status: int) -> str:
    if status == 0:
        return ""
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    return f"it ended with status {status}"


def _last_words(text: str) -> tuple[str, ...]:
    """The last lines, without the frames of a traceback."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return tuple(line for line in lines if not line.startswith("Traceback"))[-LAST:]


def _read(text: str, crash: str, said: tuple[str, ...]) -> Probe:
    """The lines of a probe; of one that was killed while it wrote, the whole lines."""
    rows: list[Any] = [json.loads(line) for line in text.split("\n")[:-1]]
    devices = tuple(Device(**row["device"]) for row in rows if "device" in row)
    checks = tuple(Check(**row["check"]) for row in rows if "check" in row)
    doing = next((row["doing"] for row in reversed(rows) if "doing" in row), "starting JAX")
    return Probe(devices, checks, crash, doing if crash else "", said)
