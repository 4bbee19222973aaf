"""A teacher's likeliest tokens from a file (docs/distillation.md has its format), which the teacher
writes once, before the training, where it is missing: no step then needs the teacher in memory.

A sequence of the run finds its own in the file by its tokens, wherever it stands there.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from tqdm import tqdm

from mud_puppy.config import KEYS, Config
from mud_puppy.data import Example, Loader, TaughtExample, collate_taught
from mud_puppy.errors import UserError, nearest_file
from mud_puppy.model.tensors import write_safetensors
from mud_puppy.run.datasets import RunData
from mud_puppy.run.prepare import put_batch
from mud_puppy.run.scores import likeliest
from mud_puppy.run.teacher import (
    TENSORS,
    TYPES,
    Teacher,
    check_teacher,
    load_teacher,
    taught_header,
)

log = logging.getLogger("mud_puppy")
MORE_THAN_ALL = 1 + 1e-3  # a sum of probabilities that is no rounding


@dataclass(frozen=True, eq=False)
class Taught:
    """A file, mapped: of all N tokens of its sequences `ids` and `logprobs` [N, k], and where in
    them each sequence begins, by the bytes of its tokens (int32)."""

    ids: Int[np.ndarray, "N k"]
    logprobs: Float[np.ndarray, "N k"]
    starts: dict[bytes, int]
    temperature: np.float32


def with_teacher(config: Config, data: RunData, words: int, tokenizer: Any, mesh: Mesh) -> RunData:
    """The data with what the config's teacher says of it, where that comes from a file. words: the
    student's, of which an id of the file must be one.

    UserError for a teacher or a file that is not of this student, these rows and these keys.
    """
    if config.method != "distill":
        return data
    loaders = [data.train] if data.evaluation is None else [data.train, data.evaluation]
    path = Path(config.teacher_logits or "").expanduser()
    if config.asks_teacher or not path.exists():
        examples = [example for loader in loaders for example in loader.examples]
        if config.teacher is None:
            raise UserError(
                f"teacher_logits {path}: no such file.{nearest_file(path)} Give the teacher that "
                "is to write it, too"
            )
        check_teacher(config, tokenizer, examples)
        if config.asks_teacher:
            return data
        _write(config, load_teacher(config, mesh), path, data.train, examples, words)
    taught = read_taught(path)
    if taught.temperature != np.float32(config.distill_temperature):
        raise UserError(
            f"teacher_logits {path}: is of temperature {taught.temperature:g}, and "
            f"distill_temperature is {config.distill_temperature:g}; they must be the same"
        )
    k, asked = taught.ids.shape[1], config.distill_top_k
    if asked not in (KEYS["distill_top_k"].default, k) and k < words:
        raise UserError(
            f"teacher_logits {path}: has {k} tokens after each, and distill_top_k is {asked}; "
            "leave it out, or name another file for the teacher to write"
        )
    log.info(
        "teacher_logits %s: %d tokens after each of %d are read, the teacher is not asked",
        path, k, len(taught.ids),
    )  # fmt: skip
    train, *held = (_with(loader, path, taught, words) for loader in loaders)
    return replace(data, train=train, evaluation=held[0] if held else None)


def read_taught(path: Path) -> Taught:
    """A file; UserError for one that is not of the form."""
    header = taught_header(path)
    found = {
        name: np.asarray(np.memmap(path, TYPES[entry.dtype], "r", entry.start, entry.shape))
        for name, entry in header.items()
    }
    tokens, offsets, ids, logprobs = (found[name] for name in TENSORS)
    if ids.shape != logprobs.shape or len(ids) != len(tokens):
        raise UserError(
            f"teacher_logits {path}: ids {ids.shape} and logprobs {logprobs.shape} must have one "
            f"row for each of the {len(tokens)} tokens"
        )
    if (offsets[0], offsets[-1]) != (0, len(tokens)) or (np.diff(offsets) < 0).any():
        raise UserError(
            f"teacher_logits {path}: offsets must rise from 0 to the number of tokens, "
            f"{len(tokens)}"
        )
    starts = {tokens[a:b].tobytes(): int(a) for a, b in pairwise(offsets)}
    [temperature] = found.get("temperature", np.ones(1, np.float32))
    return Taught(ids, logprobs, starts, temperature)


def _with(loader: Loader, path: Path, taught: Taught, words: int) -> Loader:
    examples = tuple(_find(example, path, taught) for example in loader.examples)
    for example in examples:
        _check(example, path, words)
    return replace(
        loader, examples=examples, collate=partial(collate_taught, k=taught.ids.shape[-1])
    )


def _find(example: Example, path: Path, taught: Taught) -> TaughtExample:
    start = taught.starts.get(example.tokens.astype(np.int32).tobytes())
    if start is None:
        raise UserError(
            f"{example.where}: teacher_logits {path} has no sequence of its {example.size} tokens; "
            "it is of other rows, of another tokenizer or chat template, or max_seq_length cut "
            "them elsewhere"
        )
    rows = slice(start, start + example.size)
    return TaughtExample(example, taught.ids[rows], taught.logprobs[rows])


def _check(example: TaughtExample, path: Path, words: int) -> None:
    """UserError for what cannot be k tokens of `words` and their log-probabilities."""
    ids, logps = example.ids[:-1], example.logps[:-1]
    where = f"{example.where}: teacher_logits {path}"
    if ids.size and not -1 <= ids.min() <= ids.max() < words:
        worst = ids.max() if ids.max() >= words else ids.min()
        raise UserError(f"{where} names token {worst}, and the student has {words}")
    total = np.where(ids < 0, 0.0, np.exp(logps)).sum(-1)
    # Not a number is no sum that is small enough.
    if not (total <= MORE_THAN_ALL).all():
        raise UserError(
            f"{where} gives its tokens probabilities of {total.max():g} in all; logprobs are "
            "logarithms to the base e, and of each token once"
        )


def _write(
    config: Config,
    teacher: Teacher,
    path: Path,
    loader: Loader,
    examples: Sequence[Example],
    words: int,
) -> None:
    """The file, of every sequence of the run once; in a part of its own until it is whole."""
    own = {example.tokens.tobytes(): example for example in examples}
    loader = Loader(
        tuple(own.values()),
        loader.batch_size,
        max_seq_length=loader.max_seq_length,
        pack=loader.pack,
        shuffle=False,
    )
    offsets = np.cumsum([0, *(example.size for example in loader.examples)])
    k = min(config.distill_top_k, words)
    shape = (int(offsets[-1]), k)
    parts = [path.with_name(f"{path.name}.{name}.tmp") for name in ("ids", "logprobs", "whole")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.memmap(parts[0], np.int32, "w+", shape=shape)
        logprobs = np.memmap(parts[1], np.float32, "w+", shape=shape)
        for i, *found in _asked(config, teacher, loader, k, words):
            ids[offsets[i] : offsets[i + 1]], logprobs[offsets[i] : offsets[i + 1]] = found
        tensors = {
            "tokens": np.concatenate([example.tokens for example in loader.examples]),
            "offsets": offsets.astype(np.int64),
            "ids": ids,
            "logprobs": logprobs,
            "temperature": np.array([config.distill_temperature], np.float32),
        }
        specs = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        write_safetensors(parts[2], specs, tensors.values())
        os.replace(parts[2], path)
    except OSError as error:
        raise UserError(f"teacher_logits {path}: cannot be written: {error.strerror}") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _asked(
    config: Config, teacher: Teacher, loader: Loader, k: int, words: int
) -> Iterator[tuple[int, Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]]:
    """(its number, ids, log-probabilities) of every example."""
    mesh, count, need = jax.sharding.get_mesh(), len(loader.rows), loader.batch_size
    ask = jax.jit(partial(likeliest, k=k, words=words, temperature=config.distill_temperature))
    for first in tqdm(range(0, count, need), "teacher", unit="batch", disable=None):
        rows = range(first, min(first + need, count))
        batch = put_batch(loader.batch_of(rows), mesh)
        found = ask(teacher, {name: x[0] for name, x in batch.items()})
        for row, ids, logps in zip(rows, *map(np.asarray, found), strict=False):  # the rest fills
            at = 0
            for i in loader.rows[row]:
                end = at + loader.examples[i].size
                yield i, ids[at:end], logps[at:end]
                at = end
