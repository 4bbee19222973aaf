"""GPTQ of a whole model, one layer at a time, on calibration batches.

A layer is observed with all layers before it in codes, and within it each group of linears that
read the same inputs with the groups before it in codes ("true sequential"): q, k, v; o; gate, up;
down (`model.fold.stages` has those of every family). So every weight makes good what those before
it lost. Memory: the model, the codes so far, one Hessian [in, in] (of experts, 1 GiB of them), and
on the host the hidden states of the calibration set, [tokens, D] in the model's dtype.

Embedding, head, routers and norms stay as they are (`awq` divides the layers' norms).
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.model import Inputs, Model
from mud_puppy.model.decoder import begin
from mud_puppy.run.finished import Finished
from mud_puppy.run.gptq_block import GptqOptions, mask_of, quantize_block, run_or_observe
from mud_puppy.weights.gptq import check
from mud_puppy.weights.leaf import is_weight
from mud_puppy.weights.quantize import is_rounded
from mud_puppy.weights.tree import at_path, layer_module, linear_paths, repeats, spans, stack

__all__ = ["GptqOptions", "check_fit", "linears", "quantize_gptq"]

Tree = Any
log = logging.getLogger("mud_puppy")


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
    called after each layer that is made. UserError for weights that are not plain arrays, for
    groups that do not fit, and where the calibration says nothing of a layer.
    """
    check_fit(params, options)
    inputs = [_inputs(batch) for batch in batches]
    if not (tokens := sum(_count(x) for x in inputs)):
        raise UserError("GPTQ: the calibration set has no tokens")
    layers, finished = model.arch.layers, None
    if folder is not None:
        finished = Finished(folder, _question(model, options, inputs))
    done = 0 if finished is None else finished.count()
    if done:
        log.info("GPTQ: %d of %d layers are there already", done, layers)
    if tokens < model.arch.hidden_size:
        log.warning("GPTQ: %d tokens say little of %d inputs", tokens, model.arch.hidden_size)
    tables = {name: params[name] for name in ("embed", "positions") if name in params}
    hidden = [] if done == layers else [np.asarray(_first(model, tables, x)) for x in inputs]
    groups = []
    for group, start in spans(params):
        blocks = [[] for _ in group]
        for layer in range(start, start + repeats(group) * len(group)):
            r, j = divmod(layer - start, len(group))
            source = _at(group[j], r)
            run = partial(run_or_observe, model.arch, model.arch.kinds[layer])
            if layer < done and finished is not None:
                block = finished.read(layer, source)
            else:
                block = quantize_block(model.arch, run, source, inputs, hidden, options, layer)
                if finished is not None:
                    finished.write(layer, block, source)
            if done < layers and layer + 1 < layers:
                for i, x in enumerate(inputs):
                    hidden[i] = np.asarray(run(block, x, hidden[i]))
            blocks[j].append(block)
            if progress is not None and layer >= done:
                progress(layer + 1, layers)
        groups.append([_stacked(own) for own in blocks])
    return {**params, "layers": groups}


@jax.jit
def _at(block: Tree, r: Any) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, r, keepdims=False), block)


@partial(jax.jit, static_argnums=0)
def _first(model: Model, tables: Tree, inputs: Inputs) -> Array:
    return begin(model.arch, tables, inputs, model.dtype)[0]


def _inputs(batch: dict[str, np.ndarray]) -> Inputs:
    names = ("tokens", "positions", "segment_ids")
    given = {name: np.asarray(batch[name], np.int32) for name in names if name in batch}
    return Inputs(**{name: x.reshape(-1, x.shape[-1]) for name, x in given.items()})


def _count(inputs: Inputs) -> int:
    mask = mask_of(inputs)
    return inputs.tokens.size if mask is None else int(mask.sum())


def _stacked(layers: list[Tree]) -> Tree:
    count = len(layers)
    return stack((layers.pop(0) for _ in range(count)), count)


def linears(params: Tree) -> Iterator[tuple[str, Any]]:
    """(HF's name in its first layer, weight) of each stack of linears that is rounded."""
    for group, start in spans(params):
        for j, block in enumerate(group):
            for path in linear_paths(block):
                if is_rounded("/".join(("layers", *path, "weight"))):
                    yield layer_module(path, start + j), at_path(block, path)["weight"]


def check_fit(params: Tree, options: GptqOptions) -> None:
    """UserError for weights, or shapes as of `abstract`, that `quantize_gptq` refuses."""
    for where, w in linears(params):
        if is_weight(w):
            raise UserError(
                f"GPTQ: {where} is a {type(w).__name__}, not a plain weight: merge adapters first, "
                "and load the model as it was before it was quantized"
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
