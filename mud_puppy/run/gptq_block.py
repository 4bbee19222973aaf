"""GPTQ of one block: its linears in order, each observed with those before it in codes."""

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
from mud_puppy.model.block import run_block
from mud_puppy.model.context import make_context
from mud_puppy.model.fold import STAGES, Stage, fold, shared, spread
from mud_puppy.weights import awq
from mud_puppy.weights.gptq import Codes, gptq, to_quantized
from mud_puppy.weights.leaf import is_weight
from mud_puppy.weights.observe import Moments, Observed, no_moments
from mud_puppy.weights.tree import layer_module

Tree = Any
log = logging.getLogger("mud_puppy")


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

    def observe(block: Tree, stage: Stage) -> Moments:
        *_, columns = block[stage.part][stage.names[0]]["weight"].shape
        moments = no_moments(columns)
        for given, x in zip(inputs, hidden, strict=True):
            moments = run(block, given, x, moments, stage)
        return moments

    block = source
    if options.awq:
        block = _scaled(arch, block, {stage: observe(block, stage) for stage in STAGES}, options)
    losses = {}
    for stage in STAGES:
        # Finished first: two programs whose devices talk, in flight at once, deadlock XLA's CPU.
        hessian = jax.block_until_ready(observe(block, stage).hessian)
        # Rows do not meet, so one pass serves all weights that read these inputs.
        weights = tuple(block[stage.part][name]["weight"] for name in stage.names)
        w = jnp.concatenate(weights)
        found = gptq(w, hessian, **options.grid, act_order=options.act_order, damp=options.damp)
        modules = dict(block[stage.part])
        dtype = source[stage.part][stage.names[0]]["weight"].dtype
        sizes = tuple(len(weight) for weight in weights)
        leaves, losses[stage] = _leaves(w, found, hessian, sizes, options.bits, dtype)
        for name, leaf in zip(stage.names, leaves, strict=True):
            modules[name] = {**modules[name], "weight": leaf}
        block = {**block, stage.part: modules}
    _tell(losses, layer)
    # What awq divided was float32 until here.
    return jax.tree.map(
        lambda x, was: x if is_weight(x) else x.astype(was.dtype), block, source, is_leaf=is_weight
    )


def _scaled(arch: Arch, block: Tree, moments: dict[Stage, Moments], options: GptqOptions) -> Tree:
    """The block with inputs enlarged as AWQ chooses."""
    # From the last to the first: what makes a stage's inputs changes before it is weighed itself.
    for stage in reversed(STAGES):
        block = _enlarged(arch, stage, options, block, moments[stage])
    return block


@partial(jax.jit, static_argnums=(0, 1, 2))
def _enlarged(arch: Arch, stage: Stage, options: GptqOptions, block: Tree, seen: Moments) -> Tree:
    w = jnp.concatenate([block[stage.part][name]["weight"] for name in stage.names])
    choices = awq.candidates(shared(arch, stage, seen.magnitude))
    errors = awq.errors(w, seen.hessian, spread(arch, stage, choices), **options.grid)
    return fold(arch, block, stage, choices[jnp.argmin(errors)])


@partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=5)
def run_or_observe(
    arch: Arch,
    kind: Layer,
    block: Tree,
    inputs: Inputs,
    x: Array,
    moments: Moments | None = None,
    stage: Stage | None = None,
) -> Any:
    """The block's output; with a stage, the moments with those of its inputs added instead."""
    context, anywhere = make_context(arch, inputs), jnp.int32(0)  # which layer: a cache would ask
    if stage is None:
        return run_block(context, kind, block, x, None, anywhere)[0]
    refs = jax.tree.map(jax.new_ref, moments)
    part, name = block[stage.part], stage.names[0]
    seen = {**part[name], "weight": Observed(part[name]["weight"], refs, mask_of(inputs))}
    run_block(context, kind, {**block, stage.part: {**part, name: seen}}, x, None, anywhere)
    return jax.tree.map(jax.freeze, refs)


def mask_of(inputs: Inputs) -> Any:
    return None if inputs.segment_ids is None else inputs.segment_ids > 0


@partial(jax.jit, static_argnums=(3, 4, 5))
@jax.default_matmul_precision("highest")
def _leaves(
    w: Array, found: Codes, hessian: Array, sizes: tuple[int, ...], bits: int, dtype: Any
) -> tuple[list[Any], Array]:
    """The leaf of each weight that w [sum of sizes, in] consists of, and the share of the outputs'
    energy that is lost."""
    whole = to_quantized(*found, bits, dtype)
    ends = np.cumsum(sizes)
    parts = [
        jax.tree.map(lambda x, a=end - size, b=end: x[a:b], whole)
        for size, end in zip(sizes, ends, strict=True)
    ]
    w = w.astype(jnp.float32)
    d = dequantize(whole, jnp.float32) - w
    lost = jnp.vdot(d @ hessian, d) / jnp.maximum(jnp.vdot(w @ hessian, w), 1e-30)
    return parts, lost


def _tell(losses: dict[Stage, Array], layer: int) -> None:
    for stage, loss in losses.items():
        name = layer_module((stage.part, stage.names[0]), layer)
        if not jnp.isfinite(loss):
            raise UserError(
                f"GPTQ: the Hessian of {name}'s inputs is not positive definite: they are not "
                "finite, or damp is too small"
            )
    parts = [f"{'/'.join(s.names)} {100 * float(loss):.2f}" for s, loss in losses.items()]
    log.info("GPTQ: layer %d, %% of the outputs lost: %s", layer, ", ".join(parts))
