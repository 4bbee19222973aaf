"""Findings of a probe: what was tried on the device and did not work."""

import re

from mud_puppy.doctor.facts import Facts
from mud_puppy.doctor.finding import Finding
from mud_puppy.doctor.watch import Check, Probe

MISSING = re.compile(r"ModuleNotFoundError: No module named '([^'.]+)")
PACKAGES = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}  # whose modules have other names
REPORT = "mud-puppy doctor --json    and report what it says"


def findings(facts: Facts, probe: Probe, causes: list[Finding]) -> list[Finding]:
    """causes: what was found of driver, plugin and variables, which explain an unused GPU."""
    explained = any(f.severity == "fault" for f in causes)
    return [
        *_crash(facts, probe, explained),
        *_fell_back(facts, probe, explained),
        *(f for check in probe.checks if check.problem for f in [_failed(check, probe)]),
    ]


def _crash(facts: Facts, probe: Probe, explained: bool) -> list[Finding]:
    if not probe.crash:
        return []
    said = " | ".join(probe.said)
    for line in probe.said:
        if "Unknown flag" in line:
            flags = line.partition("XLA_FLAGS:")[2].strip()
            what = "XLA_FLAGS has a flag that XLA does not know, which ends every program of JAX."
            return [Finding("unknown-flag", what, flags, f"take it out of XLA_FLAGS: {flags}")]
        if module := MISSING.search(line):
            package = PACKAGES.get(module[1], module[1].replace("_", "-"))
            what = f"The Python package {package} is not installed, and mud_puppy needs it."
            return [Finding("package-missing", what, line, f"pip install {package}")]
    platforms = facts.variables.get("JAX_PLATFORMS", "")
    if platforms not in ("", "cpu") and not probe.devices and not (facts.amd_gpus or facts.nvidia):
        what = "JAX_PLATFORMS names what is not here, and JAX does not start without it."
        where = f"JAX_PLATFORMS={platforms}; {said}"
        return [Finding("platform-missing", what, where, "unset JAX_PLATFORMS")]
    what = f"Trying the device did not come to its end: {probe.crash}, while {probe.doing}."
    # JAX may refuse to start without the card that a cause keeps from it.
    same = explained and not probe.devices
    return [Finding("probe-crashed", what, said, REPORT, "warning" if same else "fault")]


def _fell_back(facts: Facts, probe: Probe, explained: bool) -> list[Finding]:
    """A GPU that JAX does not use, with no cause found: JAX's own words have to do."""
    there = bool(facts.amd_gpus or facts.nvidia)
    if not there or not probe.devices or probe.on_gpu or explained:
        return []
    platform = "rocm" if facts.amd_gpus else "cuda"
    what = "JAX runs on the CPU though there is a GPU."
    said = " | ".join(probe.said) or "JAX said nothing"
    fix = f'JAX_PLATFORMS={platform} python -c "import jax; jax.devices()"    says why'
    return [Finding("cpu-instead", what, said, fix)]


def _failed(check: Check, probe: Probe) -> Finding:
    problem = check.problem or ""
    where = ", ".join(dict.fromkeys(f"{d.kind} ({d.arch})" for d in probe.devices))
    if check.kind == "kernel":
        what = f"A kernel is wrong here: {problem}."
        if probe.on_gpu:
            fix = f"none needed to train: another implementation serves in its place. {REPORT}"
        else:
            fix = f"do not train here: there is nothing to take its place. {REPORT}"
        return Finding("kernel-wrong", what, where, fix)
    if check.kind == "pinned_host":
        what = f"This device does not offer pinned_host memory: {problem}."
        fix = "gradient_checkpointing: full    instead of offload"
        return Finding("no-pinned-host", what, where, fix)
    if check.kind == "offload":
        what = f"Layer inputs that wait on the host come back wrong: {problem}."
        fix = "gradient_checkpointing: full    instead of offload"
        return Finding("offload-wrong", what, where, fix)
    if check.kind == "all-reduce":
        what = f"The sum over devices is wrong: {problem}."
        fix = "--mesh data=1,fsdp=1 trains on one card"
        fix += "; NCCL_P2P_DISABLE=1 mud-puppy doctor    tries without direct copies between cards"
        return Finding("all-reduce-wrong", what, where, fix)
    what = f"Matrix products in {check.name} are wrong: {problem}."
    return Finding("matmul-wrong", what, where, REPORT)
