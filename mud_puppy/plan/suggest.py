"""What to change when a step does not fit: levers in the order of what they cost, each compiled.

First those that change no number of the result (fewer rows at a time, checkpointing, tiles, layer
inputs on the host), then smaller optimizer states and codes, adapters instead of weights, shorter
rows, more cards.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.weights.lora import ALL_LINEAR

log = logging.getLogger("mud_puppy")

Changes = dict[str, Any]
MOST = 3  # suggestions are enough
TILE = 2048  # tokens


@dataclass(frozen=True)
class Suggestion:
    """Changed keys (and devices), and what the compiled step then needs on each device."""

    changes: Changes
    devices: int
    needed: int
    why: str


@dataclass(frozen=True)
class Lever:
    """changes(config, devices) -> the keys to change, or None where there is nothing to gain.
    `fixed`: whether it lessens what does not grow with the tokens."""

    why: str
    changes: Callable[[Config, int], Changes | None]
    fixed: bool = False


def _fewer_rows(config: Config, devices: int) -> Changes | None:
    if config.tokens_per_batch is not None:
        least = config.max_seq_length * devices
        times = config.tokens_per_batch // least
        more = {"gradient_accumulation": config.gradient_accumulation * times}
        return {"tokens_per_batch": least, **more} if times > 1 else None
    if config.batch_size <= devices:
        return None
    whole = config.batch_size * config.gradient_accumulation
    return {"batch_size": devices, "gradient_accumulation": -(-whole // devices)}


def _checkpointing(config: Config, devices: int) -> Changes | None:
    saved = config.gradient_checkpointing in ("none", "attention", "projections")
    return {"gradient_checkpointing": "full"} if saved else None


def _offload(config: Config, devices: int) -> Changes | None:
    already = config.gradient_checkpointing == "offload"
    return None if already else {"gradient_checkpointing": "offload"}


def _tile(config: Config, devices: int) -> Changes | None:
    whole = config.sequence_tile is None and not config.precision.startswith("fp8")
    return {"sequence_tile": TILE} if whole else None


def _smaller_states(config: Config, devices: int) -> Changes | None:
    small = {"adamw": "adamw_8bit", "lion": "lion_8bit"}.get(config.optimizer)
    return None if small is None else {"optimizer": small}


def _training(config: Config, way: str) -> Changes:
    """The key that says what becomes of the weights."""
    return {"method" if config.trains == config.method else "tune": way}


def _codes(config: Config, devices: int) -> Changes | None:
    if config.trains != "lora" or config.precision.startswith("fp8"):
        return None
    return _training(config, "qlora")


def _embeddings(config: Config, devices: int) -> Changes | None:
    quantized = config.trains == "qlora" and not config.quant_embeddings
    return {"quant_embeddings": True} if quantized else None


def _teacher_codes(config: Config, devices: int) -> Changes | None:
    plain = config.asks_teacher and config.teacher_quant is None
    return {"teacher_quant": "nf4"} if plain else None


def _adapters(config: Config, devices: int) -> Changes | None:
    return _training(config, "lora") if config.trains == "full" else None


def _quantized_adapters(config: Config, devices: int) -> Changes | None:
    plain = config.trains == "full" and not config.precision.startswith("fp8")
    return _training(config, "qlora") if plain else None


def _attention_alone(config: Config, devices: int) -> Changes | None:
    """Adapters on 128 experts are a tenth of the model."""
    everywhere = config.trains in ("lora", "qlora") and config.lora_targets == ALL_LINEAR
    return {"lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"]} if everywhere else None


def _shorter(config: Config, devices: int) -> Changes | None:
    half = config.max_seq_length // 2
    return {"max_seq_length": half} if half >= 256 else None


EXACT = (
    Lever("one row at a time, the same batch by accumulation", _fewer_rows),
    Lever("compute the forward pass again instead of keeping it", _checkpointing),
    Lever("projections and MLP a tile of the sequence at a time", _tile),
    Lever("each layer's input in the host's memory", _offload),
)
LONG = EXACT[2:]  # the two for long rows
OTHERS = (
    Lever("optimizer states in 8 bits", _smaller_states, fixed=True),
    Lever("the base model in 4 bits", _codes, fixed=True),
    Lever("embedding and head in int8", _embeddings, fixed=True),
    Lever("the teacher in 4 bits", _teacher_codes, fixed=True),
    Lever("adapters on attention alone", _attention_alone, fixed=True),
    Lever("adapters instead of all weights", _adapters, fixed=True),
    Lever("adapters on a base in 4 bits", _quantized_adapters, fixed=True),
    Lever("shorter rows", _shorter),
)

# The least that any step of the model needs.
LEAST = (*EXACT, OTHERS[0], OTHERS[6], *OTHERS[1:5])

# measure(changes, devices) -> the bytes that the changed config's step needs, or UserError.
Measure = Callable[[Changes, int], int]


def suggest(
    config: Config, measure: Measure, limit: int, fixed: int, devices: int, more: int
) -> list[Suggestion]:
    """Changes after which the step fits, the least costly first; empty if none of them helps.

    fixed: bytes that no lever on activations lessens. more: the most devices that may be suggested.
    """
    found: list[Suggestion] = []
    for changes, count, why in _candidates(config, fixed > limit, devices, more):
        if len(found) == MOST:
            break
        try:
            needed = measure(changes, count)
        except UserError as problem:  # such as codes whose groups divide no row of this model
            log.info("plan: not %s: %s", why, problem)
            continue
        if needed <= limit:
            found.append(Suggestion(changes, count, needed, why))
    return found


def _candidates(
    config: Config, too_much: bool, devices: int, more: int
) -> Iterator[tuple[Changes, int, str]]:
    single = [(lever, lever.changes(config, devices)) for lever in (*EXACT, *OTHERS)]
    for lever, changes in single:
        if changes and (lever.fixed or not too_much):
            yield changes, devices, lever.why
    exact = together(config, devices, EXACT)
    if exact and not too_much:
        yield exact, devices, "all that changes no number of the result"
    everything = together(config, devices, (*EXACT, *OTHERS[:4]))
    if everything and everything != exact:
        yield everything, devices, "all of that with smaller states, codes and embeddings"
    least = together(config, devices, LEAST)
    if least != everything:
        yield least, devices, "adapters on a base in 4 bits, and all of that"
    counts = [n for n in (2 * devices, 4 * devices, 8 * devices) if n <= more and not config.mesh]
    for count in counts:
        rows = -(-config.batch_size // count) * count
        changes = {"batch_size": rows} if config.tokens_per_batch is None else {}
        yield changes, count, f"{count} cards share the model and the batch"
    for count in counts:
        changes = together(config, count, LEAST)
        rows = -(-changes.get("batch_size", config.batch_size) // count) * count
        more_rows = {"batch_size": rows} if config.tokens_per_batch is None else {}
        yield changes | more_rows, count, f"the least of all, shared by {count} cards"


def together(config: Config, devices: int, levers: Sequence[Lever]) -> Changes:
    """The changes of several levers, each seeing those before it."""
    given, changes = config.to_dict(), {}
    for lever in levers:
        changes |= lever.changes(Config.load(given | changes), devices) or {}
    return changes
