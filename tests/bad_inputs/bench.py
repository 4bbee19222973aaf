"""What every case starts from, and what every refusal looks like."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERROR = "mud-puppy: error: "
SMALL = {
    "max_seq_length": 64,
    "batch_size": 2,
    "max_steps": 2,
    "precision": "fp32",
    "sample_prompts": 0,
    "mesh": "data=1,fsdp=1",
}


@dataclass(frozen=True)
class Bench:
    """A sound model, data set and finished LoRA run, each a copy that a case may damage."""

    root: Path
    model: Path
    data: Path
    run: Path
    out: Path

    def train(self, *flags: str, **named: Any) -> list[str]:
        """The command line of a small run; `named` replaces model, dataset, output or SMALL's."""
        keys = {"model": self.model, "dataset": self.data, "output": self.out} | SMALL | named
        pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in keys.items()]
        return [word for pair in pairs for word in pair] + list(flags)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def assert_one_line(printed: str, parts: tuple[str, ...]) -> None:
    *log, line = printed.splitlines()
    assert line.startswith(ERROR), printed
    assert not [other for other in log if other.startswith(ERROR)], printed
    assert "Traceback" not in printed, printed
    assert all(part in line for part in parts), (line, parts)
