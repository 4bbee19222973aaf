"""What a doctor finds: a fault, a warning or a note, with what to do about it."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["fault", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """what: one sentence. where: what it was seen in. fix: a command to copy, or what to set."""

    name: str
    what: str
    where: str
    fix: str
    severity: Severity = "fault"
