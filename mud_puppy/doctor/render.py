"""A doctor's answer as text for people, a line a fact, and as JSON for programs."""

import dataclasses
import json
import textwrap
from collections.abc import Iterable

from mud_puppy.doctor.facts import LOADER, Facts
from mud_puppy.doctor.finding import Finding
from mud_puppy.doctor.watch import Check, Probe
from mud_puppy.rocm.settings import Outcome, Record

GIB = 1024**3
WIDTH = 100
MARK = {"fault": "fault", "warning": "warning", "note": "note"}
KINDS = {
    "pinned_host": "pinned_host",
    "offload": "activation offload",
    "all-reduce": "all-reduce",
    "matmul": "products",
}
Row = tuple[str, str]


def text(facts: Facts, probe: Probe | None, settings: Record, findings: Iterable[Finding]) -> str:
    """What people read: installed, machine, what works, settings, and what to do, which is last."""
    parts = [
        _section("installed", _installed(facts)),
        _section("machine", _machine(facts)),
        _section("works", _works(probe)),
        _settings(settings),
        _findings(list(findings)),
    ]
    return "\n\n".join(parts)


def as_json(
    facts: Facts, probe: Probe | None, settings: Record, findings: Iterable[Finding]
) -> str:
    """The same for programs: keys healthy, findings, facts, probe, settings."""
    rows = [dataclasses.asdict(f) for f in findings]
    answer = {
        "healthy": not any(row["severity"] == "fault" for row in rows),
        "findings": rows,
        "facts": dataclasses.asdict(facts),
        "probe": None if probe is None else dataclasses.asdict(probe),
        "settings": dataclasses.asdict(settings),
    }
    return json.dumps(answer, indent=2)


def _installed(facts: Facts) -> list[Row]:
    versions = facts.versions
    plugins = [f"{k.replace('_', '-')} {v}" for k, v in versions.items() if k.startswith("jax_")]
    return [
        ("python", facts.python),
        ("mud_puppy", versions.get("mud_puppy", "not found")),
        ("jax", f"{versions.get('jax', 'not found')} (jaxlib {versions.get('jaxlib', 'missing')})"),
        ("JAX's plugins", ", ".join(sorted(plugins)) or "none: JAX runs on the CPU"),
        ("ROCm", facts.rocm or versions.get("rocm_sdk_core") or "not installed"),
        ("plans for AMD", facts.plan_plugin or "no compiler; mud-puppy plan says how to get it"),
    ]


def _machine(facts: Facts) -> list[Row]:
    locked = facts.memlock_bytes
    may_lock = "" if locked is None else f", {locked / 1024**2:.0f} MiB may be locked"
    rows = [
        ("kernel", facts.kernel + (", in a container" if facts.container else "")),
        ("memory", f"{facts.memory_bytes / GIB:.1f} GiB{may_lock}"),
        ("amdgpu driver", facts.amdgpu or "not loaded"),
        ("NVIDIA driver", facts.nvidia or "not loaded"),
    ]
    for gpu in facts.amd_gpus:
        rows.append(("AMD card", f"{gpu.arch}, {gpu.memory_bytes / GIB:.1f} GiB {gpu.render_node}"))
    rows += [("NVIDIA card", name) for name in facts.nvidia_gpus]
    for node in facts.nodes:
        may = "may be opened" if node.usable else f"may NOT be opened by {facts.user.name}"
        rows.append((node.path, f"{may} (mode {node.mode:04o}, group {node.group})"))
    rows += [
        (name, value or "(empty)") for name, value in facts.variables.items() if name != LOADER
    ]
    if LOADER in facts.variables:
        rows.append((LOADER, facts.variables[LOADER]))
    free = f"{facts.cache_free_bytes / GIB:.0f} GiB free"
    return [*rows, ("compiled steps", f"{facts.cache}, {free}")]


def _works(probe: Probe | None) -> list[Row]:
    if probe is None:
        return [("not tried", "--no-probe")]
    rows = [(d.platform, _device(d.kind, d.arch, d.memory_bytes)) for d in probe.devices]
    if kernels := probe.of("kernel"):
        right = sum(check.problem is None for check in kernels)
        rows.append(("kernels", f"{right} of {len(kernels)} agree with their references"))
        rows += [("", check.problem) for check in kernels if check.problem]
    for kind, title in KINDS.items():
        if checks := probe.of(kind):
            rows.append((title, ", ".join(_check(check) for check in checks)))
    if probe.crash:
        rows.append(("ended early", f"{probe.crash}, while {probe.doing}"))
    return rows


def _device(kind: str, arch: str, memory_bytes: int) -> str:
    words = [kind, *([arch] if arch != kind else [])]
    words += [f"{memory_bytes / GIB:.1f} GiB for JAX"] if memory_bytes else []
    return ", ".join(words)


def _check(check: Check) -> str:
    name = f"{check.name} " if check.kind in ("matmul", "all-reduce") else ""
    note = f" ({check.note})" if check.note and not check.problem else ""
    return name + (check.problem or "right") + note


def _settings(record: Record) -> str:
    if record.missing:
        return f"settings for AMD cards\n  none made: {record.missing}"
    lines = [line for outcome in record.outcomes for line in _outcome(outcome)]
    return "\n".join(["settings for AMD cards, made where you had set nothing", *lines])


def _outcome(outcome: Outcome) -> list[str]:
    setting = outcome.setting
    name = setting.name if outcome.value is None else f"{setting.name}={outcome.value}"
    state = {
        "set": "set",
        "yours": f"yours, kept (ours: {setting.value or 'empty'})",
        "other card": f"not set: for {', '.join(setting.archs)}",
        "left": "left as it is",
    }[outcome.state]
    return [f"  {name}    {state}", *_wrapped(setting.reason, "      ")]


def _findings(findings: list[Finding]) -> str:
    faults = sum(f.severity == "fault" for f in findings)
    count = f"{faults} fault{'s' if faults != 1 else ''}"
    lines = [count if faults else "no faults"]
    for finding in findings:
        lines += _wrapped(f"{MARK[finding.severity]} {finding.name}: {finding.what}", "  ")
        lines += _wrapped(f"seen: {finding.where}", "      ")
        lines.append(f"      fix: {finding.fix}")  # to be copied: not broken
    return "\n".join(lines)


def _section(title: str, rows: list[Row]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([title, *(f"  {name:{width}}{value}" for name, value in rows)])


def _wrapped(words: str, indent: str) -> list[str]:
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
