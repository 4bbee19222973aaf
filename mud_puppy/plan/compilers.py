"""Compile a config's step for a place: a card that is not here (XLA:ROCm, in a worker), or what is.

Both give a `Built`: what XLA planned, and what of it has a name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from queue import LifoQueue
from threading import Event
from typing import Any

import jax
from jax.sharding import Mesh

from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.parallel import make_mesh
from mud_puppy.plan.places import Place
from mud_puppy.plan.step import Held, build
from mud_puppy.rocm.compile import CompileError, Compiler, Memory, Unit
from mud_puppy.rocm.targets import Card

WORKERS = 2


@dataclass(frozen=True)
class Built:
    """A compiled step: bytes on each device and on the host for it, and FLOP of all devices."""

    needed: int
    host: int
    held: Held
    flops: int
    moved: int  # bytes that every step reads or writes at least once: arguments and results


# compile(config, rows, length, devices): rows of an accumulation, over all devices.
Compile = Callable[[Config, int, int, int], Built]


@contextmanager
def compiler(place: Place, source: Any) -> Iterator[Compile]:
    """What compiles steps of the model `source` (as `model.abstract` takes it) for the place.

    It may be called from WORKERS threads; a second worker starts when two steps are asked for at
    once. The devices at hand compile one step at a time.
    """
    ended = Event()
    with ExitStack() as stack:
        stack.callback(ended.set)
        # The last one used is the first one taken: it has started.
        idle: LifoQueue[Callable[..., Built]] = LifoQueue()
        if place.card is None:
            idle.put(_here)
        else:
            for _ in range(WORKERS):
                idle.put(partial(_on_card, stack.enter_context(Compiler()), place.card))

        def build(*step: Any) -> Built:
            compile_step = idle.get()
            try:
                if ended.is_set():  # a search that an interrupt left behind starts no other worker
                    raise RuntimeError("the compilers were closed")
                return compile_step(source, *step)
            finally:
                idle.put(compile_step)

        yield build


def _on_card(
    worker: Compiler,
    card: Card,
    source: Any,
    config: Config,
    rows: int,
    length: int,
    devices: int,
) -> Built:
    arguments = {"config": config.to_dict(), "source": source, "rows": rows, "length": length}
    unit = Unit(f"{__name__}:for_devices", arguments, card.name, devices=devices)
    try:
        made = worker.compile(unit)
    except CompileError as error:
        kind, _, words = error.said.partition(": ")
        if kind == UserError.__name__:  # the config asks for what cannot be, on any card or on this
            raise UserError(words) from error
        raise UserError(f"the step does not compile for {card.name}: {error.said}") from error
    return _built(made.memory, Held(**made.notes["held"]), made.notes["flops"])


def for_devices(
    devices: Sequence[Any], config: dict[str, Any], source: Any, rows: int, length: int
) -> tuple[Any, Mesh, dict[str, Any]]:
    """What `rocm.worker` compiles: (traced step, its mesh, notes)."""
    read = Config.load(config)
    mesh = make_mesh(read.mesh, devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = build(read, source, mesh, rows, length)
    return step.traced, mesh, {"held": asdict(step.held), "flops": step.flops}


def _here(source: Any, config: Config, rows: int, length: int, devices: int) -> Built:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step = build(config, source, mesh, rows, length)
        return _built(Memory.of(step.traced.lower().compile()), step.held, step.flops)


def _built(memory: Memory, held: Held, flops: int) -> Built:
    moved = memory.argument + memory.output - held.looked_up
    return Built(memory.needed, memory.host, held, flops, moved)
