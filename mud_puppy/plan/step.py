"""The training step of a config from shapes alone: what a plan compiles, and what it holds.

No weight exists here. `build` goes through the functions that a run goes through (the config's
transforms, optimizer, jitted step) under `jax.eval_shape`, so what is compiled is the run's own
step, for the devices of any mesh: those at hand, or a card that only a compiler knows.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import Mesh

from mud_puppy.config import DTYPES, Config
from mud_puppy.model import Model, abstract, axes, resize_embeddings
from mud_puppy.parallel import batch_devices, batch_sharding, replicated, shardings
from mud_puppy.plan.cost import flops
from mud_puppy.plan.shapes import source_of
from mud_puppy.run.kinds import kind_of
from mud_puppy.run.prepare import computed, program, scheme, transformed
from mud_puppy.run.reference import kept_of
from mud_puppy.run.teacher import teacher_shapes
from mud_puppy.run.vocabulary import with_scores
from mud_puppy.weights import partition, quantize

Tree = Any


@dataclass(frozen=True)
class Held:
    """Bytes on each device that have a name.

    Arguments of the step; the gradients of what trains; what the forward pass keeps for the
    backward pass on the device (`activations`) and in the host's memory (`offloaded`). looked_up:
    of the weights, an embedding that is no head too, of which a step may read a few rows.
    """

    weights: int
    adapter: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    offloaded: int
    looked_up: int

    @property
    def fixed(self) -> int:
        """What does not grow with the batch."""
        return self.weights + self.adapter + self.optimizer + self.gradients


@dataclass(frozen=True)
class Step:
    """A traced step: `traced.lower()` under its mesh, then `compile()`. `flops` of all devices."""

    traced: Any
    held: Held
    flops: int


def build(config: Config, source: Any, mesh: Mesh, rows: int, length: int) -> Step:
    """The step of `config` on `rows` rows of `length` tokens an accumulation, over all devices.

    source: what `model.abstract` takes (a folder, a hub id, the fields of a config.json). To be
    called with the mesh ambient (`jax.set_mesh`, or `use_abstract_mesh` where its devices cannot
    run anything), and while `kernels.target` names the card.
    """
    model, params = shapes_of(config, source)
    params = _placed(params, shardings(mesh, axes(model.arch), params))
    made = program(config, model, params, mesh, total_steps=1000)
    kept = _kept(config, model, params, mesh)
    train, frozen = partition(params)
    state = _placed(jax.eval_shape(made.init, train), made.places)
    batch = _batch(config, mesh, rows, length)
    traced = made.step.trace(state, frozen, kept, batch)
    saved = _residuals(made.loss, train, frozen, kept, batch)
    share = batch_devices(mesh) if rows % batch_devices(mesh) == 0 else 1
    trained = _bytes(train)
    held = Held(
        weights=_bytes(frozen) + _bytes(kept) + (0 if config.adapts else trained),
        adapter=trained if config.adapts else 0,
        optimizer=_bytes(replace(state, train=None)),
        batch=_bytes(batch),
        gradients=trained,
        activations=saved[jax.memory.Space.Device] // share,
        offloaded=saved[jax.memory.Space.Host] // share,
        looked_up=_bytes(frozen["embed"]) if "head" in params else 0,
    )
    return Step(traced, held, flops(traced.jaxpr.jaxpr))


def shapes_of(config: Config, source: Any) -> tuple[Model, Tree]:
    """(model, shapes of its params) as `run.prepare.load_params` gives arrays."""
    stored = DTYPES[config.precision] if config.adapts else "float32"
    model, shapes = abstract(source, dtype=stored, trust_remote_code=config.trust_remote_code)
    # The most that they can be: a plan looks at no tokenizer, which may have some of them.
    most = model.arch.vocab_size + len(config.added_tokens or ())
    model, shapes = resize_embeddings(model, shapes, most)
    model, shapes = with_scores(config, model, shapes)

    def change(params: Tree) -> Tree:
        if config.trains == "qlora":
            params = quantize(params, **asdict(scheme(config)))
        return transformed(config, params)

    return computed(config, model), jax.eval_shape(change, shapes)


def _kept(config: Config, model: Model, params: Tree, mesh: Mesh) -> Tree:
    """Shapes of what the loss compares with: the reference's own, or the teacher."""
    if config.asks_teacher:
        teacher = teacher_shapes(config, source_of(str(config.teacher), config.trust_remote_code))
        places = shardings(mesh, axes(teacher.model.arch), teacher.params)
        return replace(teacher, params=_placed(teacher.params, places))
    kept = jax.eval_shape(partial(kept_of, config), params)
    return None if kept is None else _placed(kept, shardings(mesh, axes(model.arch), kept))


def _placed(shapes: Tree, places: Tree) -> Tree:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _batch(config: Config, mesh: Mesh, rows: int, length: int) -> dict[str, Any]:
    """Shapes of what `data.loader` makes, of rows with one example each."""
    place = replicated(mesh) if rows % batch_devices(mesh) else batch_sharding(mesh, 3)
    lead = config.gradient_accumulation, rows
    return {
        name: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype, sharding=place)
        for name, x in kind_of(config).empty(length).items()
    }


def _residuals(loss: Any, train: Tree, frozen: Tree, kept: Tree, batch: Tree) -> dict[Any, int]:
    """Bytes that the forward pass of one accumulation keeps for the backward pass, by where."""
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    def residuals(train: Tree, frozen: Tree, kept: Tree, micro: Tree, key: Any) -> Any:
        return jax.vjp(lambda t: loss(t, frozen, kept, micro, key, jnp.float32(1))[0], train)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(residuals)(train, frozen, kept, micro, key).jaxpr
    found = dict.fromkeys(jax.memory.Space, 0)
    given, seen = {*map(id, jaxpr.invars)}, set()
    for v in jaxpr.outvars:
        if not isinstance(v, Literal) and id(v) not in given | seen:
            found[v.aval.memory_space] += v.aval.size * v.aval.dtype.itemsize
            seen.add(id(v))
    return found


def _bytes(tree: Tree) -> int:
    """On one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
