"""Keys and values of the original, or of a later issue, that are refused by name with the reason.

Nothing is accepted and ignored: what does not exist yet, or means nothing under XLA, says so.
"""

from typing import Any

from mud_puppy.errors import UserError

VALUES: dict[tuple[str, str], str] = {
    ("method", "rl"): "arrives with the reinforcement-learning issue",
    ("method", "multimodal"): "arrives with the image-model issue",
    ("device_map", "pipeline"): "arrives with the scaling issue; use mesh (for example fsdp=4)",
}

KEYS: dict[str, str] = {
    "revision": "is part of the model's name: org/name@revision; remove it",
    "compile": "has no meaning here: every step is already compiled by XLA; remove it",
    "stream": "arrives with the scaling issue; remove it",
    "prefetch_layers": "belongs to stream, which arrives with the scaling issue; remove it",
    "zero_offload": "arrives with the scaling issue; use mesh (for example fsdp=4)",
}


def refuse(key: str, value: Any, label: str) -> None:
    """Raise UserError with the reason when this key, or this value of it, is refused."""
    if key in KEYS:
        raise UserError(f"{label}: {KEYS[key]}.")
    if isinstance(value, str) and (key, value) in VALUES:
        raise UserError(f"{label}: {value} {VALUES[key, value]}.")
