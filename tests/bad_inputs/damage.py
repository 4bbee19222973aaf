"""Ways to spoil the files of a model or an adapter: each returns what does it to a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

TENSORS = "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def edit(path: Path, fields: dict[str, Any]) -> None:
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]], name: str = TENSORS) -> Any:
    """A damage that rewrites a safetensors file."""

    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return damage


def content(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, count: int) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def gone(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def renamed(old: str, new: str) -> Any:
    return lambda folder: (folder / old).rename(folder / new)
