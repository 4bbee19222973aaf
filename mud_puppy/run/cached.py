"""The reference's log-probabilities of all rows, computed once before the training and kept.

They lie in the run's folder as `reference/NAME.npy`, float32 [rows, T]; NAME is a digest of the
rows and of what the reference is, so that a resumed run reads its own and no other.
"""

import hashlib
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from mud_puppy.config import Config
from mud_puppy.data import Loader
from mud_puppy.errors import UserError
from mud_puppy.model import Model, scan_layers
from mud_puppy.run.datasets import RunData
from mud_puppy.run.prepare import Prepared, put_batch
from mud_puppy.run.scores import score_tokens

FOLDER = "reference"
log = logging.getLogger("mud_puppy")
_MODEL = ("model", "adapter", "precision", "tune")


def with_reference(config: Config, output: Path, run: Prepared, data: RunData) -> RunData:
    """The data with the log-probabilities beside the rows, where the config asks for that.

    run: as it was prepared, at step 0: then the policy is the reference. UserError by
    `memory_errors` of the caller, where they cannot be computed.
    """
    if config.method != "preference" or config.reference != "cached":
        return data
    add = partial(_with_logps, config, output / FOLDER, run)
    held = None if data.evaluation is None else add(data.evaluation)
    return replace(data, train=add(data.train), evaluation=held)


def _with_logps(config: Config, folder: Path, run: Prepared, loader: Loader) -> Loader:
    path = folder / f"{_digest(config, loader)}.npy"
    found = _read(path, (len(loader.rows), loader.length))
    if found is None:
        found = _logps(run, loader)
        _write(path, found)
    return replace(loader, computed={"reference_logps": found})


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """What an earlier start of the run has kept; None if nothing of use."""
    try:
        found = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        found = None
    if found is None or (found.shape, found.dtype) != (shape, np.float32):
        log.warning("%s: is damaged, and is computed again", path)
        return None
    return found


def _write(path: Path, logps: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, logps)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _logps(run: Prepared, loader: Loader) -> np.ndarray:
    """Of every row, in order."""
    mesh, params = jax.sharding.get_mesh(), run.params(run.state)
    need, count = loader.accumulation * loader.batch_size, len(loader.rows)
    found = []
    for first in tqdm(range(0, count, need), "reference", unit="batch", disable=None):
        batch = put_batch(loader.batch_of(range(count)[first : first + need]), mesh)
        for i in range(loader.accumulation):
            micro = {name: x[i] for name, x in batch.items()}
            found.append(np.asarray(_of_batch(run.model, params, micro)))
    return np.concatenate(found)[:count]


@partial(jax.jit, static_argnums=0)
def _of_batch(model: Model, params: Any, micro: dict[str, Array]) -> Array:
    return score_tokens(model, params, None, micro, scan_layers)["logps"]


def _digest(config: Config, loader: Loader) -> str:
    """Of the rows, and of the model that reads them."""
    found = hashlib.sha256()
    named = [v for k, v in sorted(config.to_dict().items()) if k in _MODEL or k.startswith("quant")]
    found.update(repr((named, loader.length, loader.rows)).encode())
    for example in loader.examples:
        for one in example.segments:
            found.update(one.tokens.tobytes())
    return found.hexdigest()[:16]
