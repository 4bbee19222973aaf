"""Layers that are finished, on disk, so that a pass over a model's layers can be taken up again.

    folder/pass.json              what was asked for: another question is an error, not a mixture
    folder/layer-00000.safetensors  the leaves of one block, and the checksum of those it came from

A file gets its name when it is whole. What is left of a later layer by an earlier crash is ignored.
"""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model.names import flatten, unflatten
from mud_puppy.run.checksums import flush

Tree = Any

_QUESTION = "pass.json"


class Finished:
    """`read` and `write` blocks by the number of their layer."""

    def __init__(self, folder: str | Path, question: dict[str, Any]) -> None:
        """UserError where the folder holds layers of another question, or cannot be written."""
        self._folder = Path(folder).expanduser()
        path = self._folder / _QUESTION
        text = json.dumps(question, indent=2, sort_keys=True) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text() != text:
                raise UserError(
                    f"{self._folder}: holds layers of other options, data or model: "
                    f"{_changed(path, question)}; delete the folder or name another"
                )
            if not path.exists():
                path.write_text(text)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written: {error}") from None

    def count(self) -> int:
        """How many layers, from the first on, are there."""
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def read(self, layer: int, source: Tree) -> Tree:
        """The block that was written, which came from the block `source`."""
        path = self._path(layer)
        try:
            with safe_open(path, framework="numpy") as file:
                told = file.metadata()
                tensors = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {error}; delete it") from None
        if told["source"] != str(_checksum(source)):
            raise UserError(f"{path}: is of a model with other weights; delete the folder")
        leaves = json.loads(told["leaves"])
        return unflatten(source, {name: _leaf(name, leaves[name], tensors) for name in leaves})

    def write(self, layer: int, block: Tree, source: Tree) -> None:
        path = self._path(layer)
        part = path.with_suffix(".tmp")
        tensors, leaves = {}, {}
        for name, leaf in flatten(block).items():
            leaves[name] = None
            if isinstance(leaf, Quantized):
                leaves[name] = {"format": leaf.format, "dtype": jnp.dtype(leaf.dtype).name}
            tensors |= {key: np.asarray(x) for key, x in _arrays(name, leaf).items()}
        told = {"source": str(_checksum(source)), "leaves": json.dumps(leaves)}
        try:
            save_file(tensors, part, metadata=told)
            flush(part)
            os.replace(part, path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be written: {error}") from None

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05}.safetensors"


def _arrays(name: str, leaf: Any) -> dict[str, Array]:
    if not isinstance(leaf, Quantized):
        return {name: leaf}
    own = {field.name: getattr(leaf, field.name) for field in fields(leaf)}
    return {f"{name}#{key}": x for key, x in own.items() if isinstance(x, jax.Array)}


def _leaf(name: str, static: dict[str, str] | None, tensors: dict[str, Array]) -> Any:
    if static is None:
        return tensors[name]
    start = f"{name}#"
    own = {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
    leaf = Quantized(own.pop("codes"), own.pop("scales"), format=static["format"])
    return replace(leaf, **own, dtype=jnp.dtype(static["dtype"]))


@jax.jit
def _checksum(block: Tree) -> Array:
    """uint32 of the bits of every leaf: the same on every device, whatever order it adds in."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(block):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        total = total * jnp.uint32(31) + bits.astype(jnp.uint32).sum(dtype=jnp.uint32)
    return total


def _changed(path: Path, question: dict[str, Any]) -> str:
    try:
        before = json.loads(path.read_text())
    except ValueError:
        return f"{path.name} is not readable"
    return ", ".join(sorted(k for k in question if before.get(k) != question[k])) or "all"
