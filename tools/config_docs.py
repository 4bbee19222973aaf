"""Writes docs/config.md from the keys of mud_puppy.config; a test compares. No hand edits there."""

import dataclasses
from pathlib import Path

from mud_puppy.config import KEYS
from mud_puppy.config.refused import KEYS as REFUSED_KEYS
from mud_puppy.config.refused import VALUES as REFUSED_VALUES
from mud_puppy.config.schema import allowed, default_text, optional

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
HEAD = """# Configuration

A run is described by flat keys. They stand in a YAML file, in a `dict` given to `mud_puppy.train`,
or on the command line as flags: `learning_rate` is `--learning-rate`. Flags win over the file.
True-or-false keys have a `--no-` form (`--no-pack-sequences`), and so has `gradient_checkpointing`.

    mud-puppy --config configs/lora.yaml --dataset chats.jsonl --output my-run --learning-rate 1e-4

An unknown key, a bad value, and a key that would have no effect are errors, in one line that names
the file and line (or the flag), the key, the value and what is allowed. Nothing is ignored. The run
folder keeps the resolved config; loading it gives the same run again.

`epochs` and `max_steps` may both be set: the first that is reached ends the run.

This page is written by `python tools/config_docs.py`.
"""
REFUSED_HEAD = """
## Refused by name

| key | why |
|---|---|
"""


def page() -> str:
    """The whole page."""
    sections: dict[str, list[str]] = {}
    for spec in KEYS.values():
        sections.setdefault(spec.metadata["section"], []).append(_row(spec))
    tables = [
        f"\n## {title}\n\n| key | meaning | takes | default | needs |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
        for title, rows in sections.items()
    ]
    refused = [f"| `{key}: {value}` | {why} |" for (key, value), why in REFUSED_VALUES.items()]
    refused += [f"| `{key}` | {why} |" for key, why in REFUSED_KEYS.items()]
    return HEAD + "".join(tables) + REFUSED_HEAD + "\n".join(refused) + "\n"


def _row(spec: dataclasses.Field) -> str:
    takes = allowed(spec) + (" or null" if optional(spec) else "")
    need = spec.metadata["needs"]
    cells = (
        f"`{spec.name}`",
        spec.metadata["help"],
        takes,
        default_text(spec).removeprefix("default "),
        need.words if need else "",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
