"""GPTQ of one block: its linears in order, each observed with those before it in codes.

Experts are observed and rounded a few at a time, as their Hessians fit, each with the rows that it
was given; one that was given none is rounded to nearest.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.kernels import dequantize
from mud_puppy.model import Arch, Inputs
from mud_puppy.model.arch import Layer
from mud_puppy.model.block import canonical, original, run_block
from mud_puppy.model.context import make_context
from mud_puppy.model.fold import Stage, fold, shared, spread, stages
from mud_puppy.weights import awq
from mud_puppy.weights.gptq import gptq, to_quantized
from mud_puppy.weights.leaf import is_weight
from mud_puppy.weights.observe import Moments, Observed, ObservedExperts, no_moments
from mud_puppy.weights.tree import Path, at_path, layer_module, with_path

Tree = Any
log = logging.getLogger("mud_puppy")

_HESSIAN_BYTES = 2**30  # of the experts that are observed at a time


@dataclass(frozen=True)
class GptqOptions:
    """`weights.gptq.gptq`'s options, and `awq`: enlarge inputs before (`weights.awq`).

    act_order and clip are on: they cost little, and docs/gptq.md says what they bring.
    """

    bits: int = 4
    group: int | str = 64
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    clip: bool = True
    awq: bool = False

    @property
    def grid(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "clip": self.clip,
        }


def quantize_block(
    arch: Arch,
    run: Callable,
    source: Tree,
    inputs: list[Inputs],
    hidden: list[np.ndarray],
    options: GptqOptions,
    layer: int,
) -> Tree:
    """The block `source` with its linears in codes. run: `run_or_observe` of this kind of layer;
    hidden: [B, T, D] of each of the inputs before the block; layer: its number, for messages."""
    floats = canonical(arch, source)

    def observe(block: Tree, stage: Stage, first: int, count: int | None) -> Moments:
        columns = at_path(block, stage.paths[0])["weight"].shape[-1]
        moments = no_moments(columns, count)
        for given, x in zip(inputs, hidden, strict=True):
            moments = run(block, given, x, moments, stage, jnp.int32(first))
        # Finished first: two programs whose devices talk, in flight at once, deadlock XLA's CPU.
        return jax.block_until_ready(moments)

    block, todo = floats, stages(arch, floats)
    if options.awq:
        # From the last to the first: what makes a stage's inputs changes before it is weighed.
        for stage in reversed([stage for stage in todo if stage.source]):
            parts = [
                _scales(arch, stage, options, w, observe(floats, stage, first, count))
                for first, count, w in _pieces(block, stage)
            ]
            block = _fold(arch, stage, block, jnp.concatenate(parts))
    lost, unseen = {}, 0
    for stage in todo:
        pieces = _pieces(block, stage)
        sizes = tuple(at_path(block, path)["weight"].shape[-2] for path in stage.paths)
        dtype = at_path(floats, stage.paths[0])["weight"].dtype
        done, loss = [], jnp.zeros(2)
        for first, count, w in pieces:
            seen = observe(block, stage, first, count)
            leaves, own = _leaves(options, sizes, dtype, w, seen)
            done, loss = [*done, leaves], loss + own
            unseen += int((seen.count == 0).sum()) if stage.experts else 0
        joined = done[0] if len(done) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *done)
        for path, leaf in zip(stage.paths, joined, strict=True):
            block = with_path(block, path, {**at_path(block, path), "weight": leaf})
        lost[stage] = loss
    _tell(arch, lost, layer, unseen)
    # What awq divided was float32 until here.
    return jax.tree.map(
        lambda x, was: x if is_weight(x) else x.astype(was.dtype),
        original(arch, block),
        source,
        is_leaf=is_weight,
    )


def _pieces(block: Tree, stage: Stage) -> list[tuple[int, int | None, Array]]:
    """(first expert, experts, their weights [experts, out, in]) of what is observed at a time; of
    no experts (0, None, [out, in]). Rows do not meet: one pass serves all weights of a stage."""
    w = jnp.concatenate([at_path(block, path)["weight"] for path in stage.paths], axis=-2)
    if not stage.experts:
        return [(0, None, w)]
    E, columns = w.shape[0], w.shape[-1]
    most = max(1, _HESSIAN_BYTES // (4 * columns * columns))
    count = max(n for n in range(1, min(E, most) + 1) if E % n == 0)
    return [(first, count, w[first : first + count]) for first in range(0, E, count)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _scales(arch: Arch, stage: Stage, options: GptqOptions, w: Array, seen: Moments) -> Array:
    """How much AWQ enlarges inputs, of each expert for itself."""
    if stage.experts and w.ndim == 3:
        return jax.vmap(partial(_scales, arch, stage, options))(w, seen)
    choices = awq.candidates(shared(arch, stage, seen.magnitude))
    errors = awq.errors(w, seen.hessian, spread(arch, stage, choices), **options.grid)
    return choices[jnp.argmin(errors)]


_fold = jax.jit(lambda arch, stage, block, s: fold(arch, block, stage, s), static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=5)
def run_or_observe(
    arch: Arch,
    kind: Layer,
    block: Tree,
    inputs: Inputs,
    x: Array,
    moments: Moments | None = None,
    stage: Stage | None = None,
    first: Array | None = None,
) -> Any:
    """The block's output; with a stage, the moments with those of its inputs added instead (of
    experts, from the `first` on)."""
    context, anywhere = make_context(arch, inputs), jnp.int32(0)  # which layer: a cache would ask
    if stage is None:
        return run_block(context, kind, block, x, None, anywhere)[0]
    refs = jax.tree.map(jax.new_ref, moments)
    path = stage.paths[0]
    module = at_path(block, path)
    if stage.experts:
        seen = ObservedExperts(module["weight"], refs, first)
    else:
        seen = Observed(module["weight"], refs, mask_of(inputs))
    block = with_path(block, path, {**module, "weight": seen})
    run_block(context, kind, block, x, None, anywhere)
    return jax.tree.map(jax.freeze, refs)


def mask_of(inputs: Inputs) -> Any:
    return None if inputs.segment_ids is None else inputs.segment_ids > 0


@partial(jax.jit, static_argnums=(0, 1, 2))
@jax.default_matmul_precision("highest")
def _leaves(
    options: GptqOptions, sizes: tuple[int, ...], dtype: Any, w: Array, seen: Moments
) -> tuple[list[Any], Array]:
    """The leaf of each weight that w [sum of sizes, in] consists of, and (energy of the outputs
    that is lost, all of it); of experts, all of them and the sums."""
    if w.ndim == 3:
        parts, energies = jax.vmap(partial(_leaves, options, sizes, dtype))(w, seen)
        return parts, energies.sum(0)
    # What saw nothing has no output to err in: plain rounding.
    hessian = jnp.where(seen.count == 0, jnp.eye(w.shape[-1]), seen.hessian)
    found = gptq(w, hessian, **options.grid, act_order=options.act_order, damp=options.damp)
    whole = to_quantized(*found, options.bits, dtype)
    ends = np.cumsum(sizes)
    parts = [
        jax.tree.map(lambda x, a=end - size, b=end: x[a:b], whole)
        for size, end in zip(sizes, ends, strict=True)
    ]
    w = w.astype(jnp.float32)
    d = dequantize(whole, jnp.float32) - w
    return parts, jnp.stack([jnp.vdot(d @ seen.hessian, d), jnp.vdot(w @ seen.hessian, w)])


def _tell(arch: Arch, lost: dict[Stage, Array], layer: int, unseen: int) -> None:
    for stage, loss in lost.items():
        if not jnp.isfinite(loss).all():
            raise UserError(
                f"GPTQ: the Hessian of {layer_module(_hf(arch, stage.paths[0]), layer)}'s inputs "
                "is not positive definite: they are not finite, or damp is too small"
            )
    told = []
    for stage, loss in lost.items():
        share = float(loss[0] / jnp.maximum(loss[1], 1e-30))
        told.append(f"{'/'.join(_hf(arch, path)[-1] for path in stage.paths)} {100 * share:.2f}")
    log.info("GPTQ: layer %d, %% of the outputs lost: %s", layer, ", ".join(told))
    if unseen:
        log.warning(
            "GPTQ: layer %d: %d weights of experts that no calibration token was given to are "
            "rounded to nearest",
            layer,
            unseen,
        )


def _hf(arch: Arch, path: Path) -> Path:
    """A canonical path as HF's module path inside of a layer."""
    tree: Tree = {}
    for name in reversed(path):
        tree = {name: tree}
    tree, found = original(arch, tree), []
    while tree:
        ((name, tree),) = tree.items()
        found.append(name)
    return tuple(found)
