"""doctor: what is installed, what works, what was set and why, and the fix of each fault."""

from dataclasses import dataclass
from functools import partial

from mud_puppy.config.schema import key

_flag = partial(key, "flags")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what is installed and what works here, and how to mend what does not."""

    json: bool = _flag(False, "print JSON")
    probe: bool = _flag(True, "try the device: kernels, host memory, all-reduce (half a minute)")


def run_doctor(args: Doctor) -> None:
    """Prints the answer; exits with 1 where there is a fault."""
    from mud_puppy.doctor import render, watch
    from mud_puppy.doctor.facts import gather
    from mud_puppy.doctor.faults import diagnose
    from mud_puppy.rocm import settings

    facts = gather()
    probe = watch.probe() if args.probe else None
    findings = diagnose(facts, probe)
    write = render.as_json if args.json else render.text
    print(write(facts, probe, settings.record(), findings))
    if any(f.severity == "fault" for f in findings):
        raise SystemExit(1)
