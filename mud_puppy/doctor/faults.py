"""From facts and a probe to findings: pure, and each with its fix.

What keeps a GPU from being used is a fault where no GPU works; where one does, and another is in
the way of nothing (an AMD processor's own graphics beside an NVIDIA card), it is a warning.
"""

from dataclasses import replace

from mud_puppy.doctor import access, installed, works
from mud_puppy.doctor.facts import Facts
from mud_puppy.doctor.finding import Finding
from mud_puppy.doctor.watch import Probe


def diagnose(facts: Facts, probe: Probe | None) -> list[Finding]:
    """Faults first, then warnings, then notes. probe: None where none was asked for."""
    causes = [
        *access.nodes(facts),
        *access.driver(facts),
        *installed.plugins(facts),
        *installed.rocm(facts),
        *access.hidden(facts),
    ]
    if probe is not None and probe.on_gpu:
        causes = [replace(f, severity="warning") if f.severity == "fault" else f for f in causes]
    found = [
        *causes,
        *access.override(facts),
        *access.mixed(facts),
        *installed.architecture(facts),
        *installed.plan_plugin(facts),
        *([] if probe is None else works.findings(facts, probe, causes)),
        *access.locked_memory(facts, probe),
        *_without_gpu(facts),
    ]
    order = ("fault", "warning", "note")
    return sorted(found, key=lambda f: order.index(f.severity))


def has_gpu(facts: Facts) -> bool:
    """Whether a GPU is in the machine, working or not."""
    return bool(
        facts.amd_gpus
        or facts.amd_pci
        or facts.node("/dev/kfd")
        or facts.nvidia
        or facts.nvidia_pci
    )


def _without_gpu(facts: Facts) -> list[Finding]:
    if has_gpu(facts):
        return []
    fix = "mud-puppy plan --config CONFIG --target 7900xtx    plans for a card that is not here"
    plans = "can be made"
    if facts.plan_fault:
        fix, plans = facts.plan_command, "need a compiler, which is not here"
    return [
        Finding(
            "no-gpu",
            "There is no GPU in this machine. Everything runs on the CPU, which suits small "
            f"models, and plans for AMD cards {plans}.",
            "no AMD or NVIDIA device on PCI",
            fix,
            "note",
        )
    ]
