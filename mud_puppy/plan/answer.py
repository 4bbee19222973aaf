"""`plan`: a config and a place -> what its step needs, what would fit, a floor of its time."""

import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mud_puppy.config import Config
from mud_puppy.data import padded_length
from mud_puppy.errors import UserError
from mud_puppy.model import abstract
from mud_puppy.parallel import mesh_devices, mesh_sizes
from mud_puppy.plan.compilers import WORKERS, Built, Compile, compiler
from mud_puppy.plan.places import Place, find_place
from mud_puppy.plan.search import largest, length_grain
from mud_puppy.plan.shapes import find_shape, shape_of, source_of
from mud_puppy.plan.suggest import LONG, Changes, Suggestion, suggest, together
from mud_puppy.run.datasets import rows_of
from mud_puppy.run.kinds import kind_of
from mud_puppy.sampling import context_length

log = logging.getLogger("mud_puppy")
MOST_ROWS = 1024  # no larger batch is looked for
MOST_DEVICES = 8  # of a host
FP8 = 2  # float8 products in the time of one in bf16, at most: of every card and GPU in `places`


@dataclass(frozen=True)
class Plan:
    """What a config's step needs at a place. Memory is of each device, tokens/s of all together.

    rows, length: of the batch that was asked for. max_batch_size: the most rows of that length
    found; max_seq_length: the longest row found with one row a device, up to the model's own
    positions; max_seq_length_offloaded: the same with layer inputs on the host and tiles of the
    sequence. All were compiled; 0: none fits, or none was looked for.
    """

    config: Config
    place: Place
    model: str
    rows: int
    length: int
    built: Built
    model_positions: int
    max_batch_size: int = 0
    max_seq_length: int = 0
    max_seq_length_offloaded: int = 0
    suggestions: tuple[Suggestion, ...] = ()
    searched: bool = False

    @property
    def fits(self) -> bool:
        return self.built.needed <= self.place.limit

    @property
    def tokens(self) -> int:
        """Of a step, all accumulations and devices together."""
        return self.rows * self.length * self.config.gradient_accumulation

    @property
    def stretch(self) -> Changes:
        """The keys that `max_seq_length_offloaded` changes."""
        return together(self.config, self.place.devices, LONG)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each device by what they are for; they add up to `built.needed`."""
        held = self.built.held
        rest = self.built.needed - held.weights - held.adapter - held.optimizer
        activations = min(held.activations, max(rest, 0))
        return {
            "weights": held.weights,
            "adapter": held.adapter,
            "optimizer": held.optimizer,
            "activations": activations,
            "temporaries": rest - activations,
        }

    @property
    def floor_s(self) -> float | None:
        """No step takes less: its products at the peak of all devices, or its memory traffic at
        full bandwidth, whichever is longer. None where the peaks are not known.

        Each row is taken to be one example: of packed rows attention skips what it does not see.
        """
        if self.place.flops is None or self.place.bandwidth is None:
            return None
        peak = self.place.flops * (FP8 if self.config.precision == "fp8" else 1)
        compute = self.built.flops / (peak * self.place.devices)
        return max(compute, self.built.moved / self.place.bandwidth)

    @property
    def roofline_tokens_per_s(self) -> float | None:
        return None if self.floor_s is None else self.tokens / self.floor_s


def plan(
    config: Config | Mapping[str, Any] | str | os.PathLike,
    target: str | None = None,
    *,
    devices: int | None = None,
    shape: str | None = None,
    memory_gib: float | None = None,
    search: bool = True,
) -> Plan:
    """Compiles the training step of `config` for `target` and says what it needs.

    target: an AMD card ("7900xtx", "mi300x", "gfx1100"), "cpu" or "gpu" for the device at hand;
    None: the config's `target`, else what is at hand. devices: how many of it; None: of a card
    those of the config's mesh, else one; of what is at hand all. shape: a model of `plan.shapes`
    instead of the config's. memory_gib: what a run may take of each device (None: 95 % of a card,
    what JAX's allocator gives of a device at hand). search: also find the largest batch and the
    longest sequence, and what to change when the step does not fit.

    Raises UserError for a config, model, card or compiler that cannot be had or does not compile.
    """
    read = Config.load(config)
    if read.method == "gptq":
        raise UserError("method gptq trains nothing, there is no step to plan")
    stored = read.quant_backend == "stored" and read.trains == "qlora"
    if stored or read.teacher_quant == "stored":
        raise UserError(
            f"{'quant_backend' if stored else 'teacher_quant'} stored: a plan reads no weights; "
            "name the format of the codes"
        )
    place = find_place(target or read.target, devices, memory_gib)
    count = mesh_devices(read.mesh) if place.card and not devices else place.devices
    place = replace(place, devices=math.prod(mesh_sizes(read.mesh, count)))
    source, name = _source(read, shape)
    arch = abstract(source, trust_remote_code=read.trust_remote_code)[0].arch
    most = context_length(arch)
    rows, length = _size(read, place.devices)
    if read.max_seq_length > most:
        raise UserError(f"max_seq_length {read.max_seq_length}: the model has {most} positions")
    with compiler(place, source) as build:
        built = _told(build, read, rows, length, place.devices)
        found = Plan(read, place, name, rows, length, built, most)
        return _searched(found, partial(_told, build)) if search else found


def _size(config: Config, devices: int) -> tuple[int, int]:
    """(rows, length) of a batch, when every row is filled."""
    length = padded_length(kind_of(config).sequences * config.max_seq_length)
    return rows_of(config, length, devices), length


def _told(build: Compile, config: Config, rows: int, length: int, devices: int) -> Built:
    log.info("plan: compiling %d x %d tokens", rows, length)
    return build(config, rows, length, devices)


def _source(config: Config, shape: str | None) -> tuple[Any, str]:
    """(what `model.abstract` takes, its name)"""
    if shape is not None:
        return find_shape(shape), shape
    source, known = source_of(config.model, config.trust_remote_code), shape_of(config.model)
    return source, config.model if source == config.model else f"{config.model} (shape {known})"


def _searched(found: Plan, build: Compile) -> Plan:
    count, limit, fixed = found.place.devices, found.place.limit, found.built.held.fixed
    each = kind_of(found.config).sequences  # that a row holds, all of the same length
    usual_length = found.length // each

    def needed(changes: Changes, devices: int, rows: int = 0, length: int = 0) -> int:
        read = Config.load(found.config.to_dict() | changes)
        usual = _size(read, devices)
        size = (rows or usual[0], length or usual[1])
        if not changes and (*size, devices) == (found.rows, found.length, count):
            return found.built.needed
        return build(read, *size, devices).needed

    def longest(changes: Changes) -> int:
        def of(length: int) -> int:
            return needed(changes, count, count, each * length)

        most = padded_length(found.model_positions)
        known, first = {0: fixed}, most if changes else usual_length  # the levers often reach all
        if not changes and found.rows == count:
            known, first = known | {usual_length: found.built.needed}, None
        found_length = largest(of, limit, known, length_grain, most, first)
        return min(found_length, found.model_positions)  # the last few tokens are padding

    def most_rows(longest_row: int) -> int:
        def of(rows: int) -> int:
            return needed({}, count, rows * count)

        known, most = {0: fixed, found.rows // count: found.built.needed}, MOST_ROWS // count
        # So many rows have as many tokens as the longest row, and need about as much.
        first = min(longest_row // usual_length, most)
        first = None if first in (0, *known) else first
        return count * largest(of, limit, known, lambda rows: 1, most, first)

    pool = ThreadPoolExecutor(WORKERS)
    try:
        length = pool.submit(longest, {})
        stretched = pool.submit(longest, found.stretch) if found.stretch else length
        rows = pool.submit(most_rows, length.result())
        found = replace(
            found,
            searched=True,
            max_batch_size=rows.result(),
            max_seq_length=length.result(),
            max_seq_length_offloaded=stretched.result(),
        )
    finally:  # after an error or Ctrl-C nobody waits for the searches: `compiler` ends its workers
        pool.shutdown(wait=False, cancel_futures=True)
    if found.fits:
        return found
    most = MOST_DEVICES if found.place.card else count
    ideas = suggest(found.config, needed, limit, fixed, count, most)
    return replace(found, suggestions=tuple(ideas))
