"""The teacher of method distill: another model, frozen, beside the one that trains, or a file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mud_puppy.config import DTYPES, Config
from mud_puppy.data import AnyExample
from mud_puppy.errors import UserError
from mud_puppy.model import Model, abstract, axes, load, load_tokenizer
from mud_puppy.model.header import Entry, read_header
from mud_puppy.model.load import stored_codes
from mud_puppy.parallel import shardings
from mud_puppy.sampling import context_length
from mud_puppy.weights import Scheme, quantize, quantizer

Tree = Any

# What `teacher_logits` is made of: dtypes that it may have, and the tensors that it must.
TYPES = {name: np.dtype(kind) for name, kind in (("I32", "i4"), ("I64", "i8"), ("F32", "f4"))}
TENSORS = {"tokens": ("I32", 1), "offsets": ("I64", 1), "ids": ("I32", 2), "logprobs": ("F32", 2)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """A model with its params, or their shapes; the model is static under jit."""

    params: Any
    model: Model = field(metadata={"static": True})


def load_teacher(config: Config, mesh: Mesh) -> Teacher:
    """The config's teacher on the mesh, in the run's precision or in codes, which are made as each
    tensor is read."""
    model, params = load(
        _source(config),
        dtype=DTYPES[config.precision],
        mesh=mesh,
        on_leaf=quantizer(Scheme(config.teacher_quant)) if _encodes(config) else None,
        trust_remote_code=config.trust_remote_code,
        keep_codes=config.teacher_quant == "stored",
    )
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    return Teacher(params, _computed(config, model))


def teacher_shapes(config: Config, source: Any) -> Teacher:
    """`load_teacher` in shapes. source: what `model.abstract` takes."""
    dtype = DTYPES[config.precision]
    model, shapes = abstract(source, dtype=dtype, trust_remote_code=config.trust_remote_code)
    if _encodes(config):
        shapes = jax.eval_shape(partial(quantize, format=str(config.teacher_quant)), shapes)
    return Teacher(shapes, _computed(config, model))


def check_teacher(config: Config, tokenizer: Any, examples: Sequence[AnyExample]) -> None:
    """UserError for a teacher that cannot teach this: without words, with other tokens, with codes
    where codes are to be made, with too few positions for one of the examples."""
    source, trusted = _source(config), config.trust_remote_code
    arch = abstract(source, trust_remote_code=trusted)[0].arch
    named = f"teacher {source}"
    if arch.task != "lm":
        raise UserError(f"{named}: gives scores of each {arch.task}, no words to learn")
    layout = stored_codes(source, trusted)
    if layout and _encodes(config):
        raise UserError(f"{named}: its weights are in codes ({layout}) already: no teacher_quant")
    theirs = load_tokenizer(source, trust_remote_code=trusted)
    if difference := _difference(tokenizer.get_vocab(), theirs.get_vocab()):
        raise UserError(
            f"{named}: has another tokenizer than {config.model}: {difference}; a teacher must "
            "have the student's tokens"
        )
    most = context_length(arch)
    longest = max(examples, key=lambda example: example.size)
    sampled = config.rollout_max_new_tokens if config.distill_on_policy else 0
    if longest.size + sampled > most:
        with_samples = f" (and {sampled} may be sampled)" if sampled else ""
        raise UserError(
            f"max_seq_length {config.max_seq_length}: {longest.where} has {longest.size} tokens"
            f"{with_samples}, but the {named} has {most} positions; set max_seq_length to at most "
            f"{most - sampled}"
        )


def taught_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file of a teacher's likeliest tokens; UserError for one that lacks some."""
    header = read_header(path, {name: kind.itemsize for name, kind in TYPES.items()})
    for name, (kind, rank) in TENSORS.items():
        entry = header.get(name)
        if entry is None or (entry.dtype, len(entry.shape)) != (kind, rank) or 0 in entry.shape:
            shape = " x ".join(("tokens", "k")[:rank])
            raise UserError(f"teacher_logits {path}: has no tensor {name}, {kind} of {shape}")
    known = {name: header[name] for name in (*TENSORS, "temperature") if name in header}
    if "temperature" in known and known["temperature"].shape != (1,):
        raise UserError(f"teacher_logits {path}: temperature is not one number, F32 of 1")
    return known


def top_k_of(config: Config) -> int:
    """How many tokens after each token the config's file names, or will; 0 without a file."""
    if config.teacher_logits is None:
        return 0
    path = Path(config.teacher_logits).expanduser()
    return taught_header(path)["ids"].shape[1] if path.exists() else config.distill_top_k


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    """The first id that is not the same token in both."""
    own, other = ({i: token for token, i in words.items()} for words in (ours, theirs))
    for index in sorted(own.keys() | other.keys()):
        mine, its = own.get(index), other.get(index)
        # What fills a GGUF file's list up to the embedding's rows is no token.
        if mine != its and not (mine is None and re.fullmatch(rf"\[PAD{index}\]", its or "")):
            return f"token {index} is {its!r} there, {mine!r} here"
    return None


def _source(config: Config) -> str:
    assert config.teacher is not None  # method distill has one
    return config.teacher


def _encodes(config: Config) -> bool:
    return config.teacher_quant not in (None, "stored")


def _computed(config: Config, model: Model) -> Model:
    return replace(model, dtype=DTYPES[config.precision], tile=config.sequence_tile)
