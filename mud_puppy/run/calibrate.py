"""GPTQ of a whole model, one layer at a time, on calibration batches.

A layer is observed with all layers before it in codes, and within it each group of linears that
read the same inputs with the groups before it in codes ("true sequential"): q, k, v; o; gate, up;
down. So every weight makes good what those before it lost. Memory: the model, the codes so far, one
Hessian [in, in] (AWQ: those of a layer), and on the host the hidden states of the calibration set,
[tokens, D] in the model's dtype.

Embedding, head and norms stay as they are (`awq` divides the layers' norms).
"""

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.kernels import dequantize
from mud_puppy.model import Arch, Inputs, Model
from mud_puppy.model.decoder import begin, make_context, run_block
from mud_puppy.model.fold import STAGES, Stage, fold, shared, spread
from mud_puppy.run.finished import Finished
from mud_puppy.weights import awq
from mud_puppy.weights.gptq import Codes, check, gptq, to_quantized
from mud_puppy.weights.leaf import is_weight
from mud_puppy.weights.observe import Moments, Observed, no_moments
from mud_puppy.weights.tree import layer_module, linear_paths, repeats, spans, stack

Tree = Any
log = logging.getLogger("mud_puppy")


@dataclass(frozen=True)
class GptqOptions:
    """`weights.gptq.gptq`'s options, and `awq`: enlarge inputs before (`weights.awq`)."""

    bits: int = 4
    group: int | str = 64
    symmetric: bool = True
    act_order: bool = False
    damp: float = 0.01
    clip: bool = False
    awq: bool = False

    @property
    def grid(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "clip": self.clip,
        }


def quantize_gptq(
    model: Model,
    params: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    options: GptqOptions,
    *,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tree:
    """`params` with the layers' linear weights as `Quantized`.

    batches: int32 arrays [..., T] `tokens`, and if there are any `positions` and `segment_ids` (0
    is padding, which is not observed), as the SFT loader makes them. folder: finished layers are
    written there, and those that are there already are not made again. progress(done, layers) is
    called after each layer. UserError for weights that are not plain arrays, for groups that do not
    fit, and where the calibration says nothing of a layer.
    """
    _check(params, options)
    inputs = [_inputs(batch) for batch in batches]
    if not (tokens := sum(_count(x) for x in inputs)):
        raise UserError("GPTQ: the calibration set has no tokens")
    layers, finished = model.arch.layers, None
    if folder is not None:
        finished = Finished(folder, _question(model, options, inputs))
    done = 0 if finished is None else finished.count()
    if tokens < model.arch.hidden_size:
        log.warning("GPTQ: %d tokens say little of %d inputs", tokens, model.arch.hidden_size)
    hidden = [] if done == layers else _embedded(model, params, inputs)
    groups = []
    for group, start in spans(params):
        blocks = [[] for _ in group]
        for layer in range(start, start + repeats(group) * len(group)):
            r, j = divmod(layer - start, len(group))
            source = _at(group[j], r)
            run = partial(_run, model.arch, model.arch.windows[layer])
            if layer < done and finished is not None:
                block = finished.read(layer, source)
            else:
                block = _layer(model.arch, run, source, inputs, hidden, options, layer)
                if finished is not None:
                    finished.write(layer, block, source)
            if done < layers and layer + 1 < layers:
                hidden = [np.asarray(run(block, *x)) for x in zip(inputs, hidden, strict=True)]
            blocks[j].append(block)
            if progress is not None:
                progress(layer + 1, layers)
        groups.append([_stacked(own) for own in blocks])
    return {**params, "layers": groups}


def _layer(
    arch: Arch,
    run: Callable,
    source: Tree,
    inputs: list[Inputs],
    hidden: list[np.ndarray],
    options: GptqOptions,
    layer: int,
) -> Tree:
    """The block with its linears in codes."""

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
        hessian = observe(block, stage).hessian
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
def _run(
    arch: Arch,
    window: int | None,
    block: Tree,
    inputs: Inputs,
    x: Array,
    moments: Moments | None = None,
    stage: Stage | None = None,
) -> Any:
    """The block's output; with a stage, the moments with those of its inputs added instead."""
    context, anywhere = make_context(arch, inputs), jnp.int32(0)  # which layer: a cache would ask
    if stage is None:
        return run_block(context, window, block, x, None, anywhere)[0]
    refs = jax.tree.map(jax.new_ref, moments)
    part, name = block[stage.part], stage.names[0]
    seen = {**part[name], "weight": Observed(part[name]["weight"], refs, _mask(inputs))}
    run_block(context, window, {**block, stage.part: {**part, name: seen}}, x, None, anywhere)
    return jax.tree.map(jax.freeze, refs)


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


@jax.jit
def _at(block: Tree, r: Any) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, r, keepdims=False), block)


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


@partial(jax.jit, static_argnums=0)
def _first(model: Model, embed: Any, inputs: Inputs) -> Array:
    return begin(model.arch, {"embed": embed}, inputs, model.dtype)[0]


def _embedded(model: Model, params: Tree, inputs: list[Inputs]) -> list[np.ndarray]:
    return [np.asarray(_first(model, params["embed"], x)) for x in inputs]


def _inputs(batch: dict[str, np.ndarray]) -> Inputs:
    names = ("tokens", "positions", "segment_ids")
    given = {name: np.asarray(batch[name], np.int32) for name in names if name in batch}
    return Inputs(**{name: x.reshape(-1, x.shape[-1]) for name, x in given.items()})


def _mask(inputs: Inputs) -> Any:
    return None if inputs.segment_ids is None else inputs.segment_ids > 0


def _count(inputs: Inputs) -> int:
    mask = _mask(inputs)
    return inputs.tokens.size if mask is None else int(mask.sum())


def _stacked(layers: list[Tree]) -> Tree:
    count = len(layers)
    return stack((layers.pop(0) for _ in range(count)), count)


def _check(params: Tree, options: GptqOptions) -> None:
    for group, start in spans(params):
        for j, block in enumerate(group):
            for part, name in linear_paths(block):
                w, where = block[part][name]["weight"], layer_module((part, name), start + j)
                if is_weight(w):
                    raise UserError(
                        f"GPTQ: {where} is a {type(w).__name__}, not a plain weight: merge "
                        "adapters first, and load the model as it was before it was quantized"
                    )
                try:
                    check(w.shape[-1], options.bits, options.group)
                except ValueError as error:
                    raise UserError(f"GPTQ: {where}: {error}") from None


def _question(model: Model, options: GptqOptions, inputs: list[Inputs]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for array in jax.tree.leaves(inputs):
        digest.update(f"{array.shape}".encode() + array.tobytes())
    arch = hashlib.sha256(repr(model.arch.replace(config="")).encode()).hexdigest()
    return {
        "options": asdict(options),
        "data": digest.hexdigest(),
        "model": arch,
        "dtype": model.dtype,
    }
