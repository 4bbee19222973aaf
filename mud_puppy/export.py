"""Params to folders that other programs load: HF safetensors, full or with adapters merged.

Tensors go to disk one at a time, each gathered from its shards, merged and rounded just before.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model.families import rows
from mud_puppy.model.files import find_model
from mud_puppy.model.load import check_dtype
from mud_puppy.model.module import Model, path_in_table
from mud_puppy.model.names import flatten, hf_names
from mud_puppy.model.quantized_files import Writer, mxfp4_writer, writer
from mud_puppy.model.save import Spec, write_configs, write_tokenizer, write_weights
from mud_puppy.weights import Int8Dynamic, Lora, base_of, dense, is_weight
from mud_puppy.weights.tree import under_rounding

Tree = Any

log = logging.getLogger("mud_puppy")

_CODES = Quantized | Int8Dynamic

_MAX_SHARD_BYTES = 5 * 10**9


def save_hf(
    model: Model,
    params: Tree,
    out: str | Path,
    dtype: str | None = "bfloat16",
    tokenizer: Any = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that transformers loads: safetensors, config, generation config, tokenizer.

    dtype: of every tensor, None keeps each leaf's. tokenizer: saved along; None takes that of the
    folder or GGUF file that the model came from. UserError for params with adapters, and when the
    folder cannot be written. An older model in the folder is replaced.
    """
    _refuse_adapters(params)
    save_merged(model, params, out, dtype, tokenizer, max_shard_bytes)


def save_merged(
    model: Model,
    params: Tree,
    out: str | Path,
    dtype: str | None = "bfloat16",
    tokenizer: Any = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """`save_hf` with every adapter added into its base, in float32, rounded once."""
    check_dtype(dtype)
    places = _places(model, params)
    specs = {name: _spec(place, dtype) for name, place in places.items()}

    def tensor(name: str) -> np.ndarray:
        return _read(places[name], specs[name][1])

    whole = dtype or _widest(specs)
    _write(model, Path(out).expanduser(), specs, tensor, whole, tokenizer, max_shard_bytes)


def save_quantized(
    model: Model,
    params: Tree,
    out: str | Path,
    dtype: str = "bfloat16",
    tokenizer: Any = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    layout: Writer | None = None,
) -> None:
    """`save_hf` that keeps codes as codes, in a layout that transformers loads.

    nf4 is written as bitsandbytes', the other formats as compressed-tensors, unless `layout` says
    how, and gpt-oss whose experts alone are in mxfp4 as its own files are; what is no `Quantized`
    in `dtype`. UserError for adapters, and where a layout cannot hold a
    format.
    """
    check_dtype(dtype)
    _refuse_adapters(params)
    places = _places(model, params)
    coded = _coded(places, dtype)
    of_all = _of_all_experts(places, coded)
    if of_all and not coded and all(_is_mxfp4(place.leaf) for place in of_all.values()):
        layout, coded = mxfp4_writer(), of_all
    elif of_all:
        log.warning(
            "%s: %d tensors, as %s, are written as floats: the layout has no codes of all experts",
            out,
            len(of_all),
            next(iter(of_all)),
        )
    found = layout or _layout(places, dtype)
    packed = lru_cache(maxsize=1)(lambda module: found.pack(_one(coded[module])))
    specs: dict[str, Spec] = {}
    of: dict[str, tuple[str, str]] = {}
    for name, place in places.items():
        module = name.removesuffix(".weight")
        if module not in coded:
            specs[name] = _spec(place, dtype)
            continue
        # Each is packed, here and again to be written: texts in a layout have lengths of their own.
        for suffix, array in packed(module).items():
            tensor_name = f"{module}{found.between}{suffix}"
            specs[tensor_name] = array.shape, array.dtype
            of[tensor_name] = module, suffix

    def tensor(name: str) -> np.ndarray:
        if name in of:
            module, suffix = of[name]
            return packed(module)[suffix]
        return _read(places[name], specs[name][1])

    extra = {"quantization_config": found.config}
    _write(model, Path(out).expanduser(), specs, tensor, dtype, tokenizer, max_shard_bytes, extra)


def _refuse_adapters(params: Tree) -> None:
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    if any(isinstance(under_rounding(w), Lora) for w in leaves):
        raise UserError(
            "these params have adapters: merge them first (merge_lora), or write the adapter alone "
            "(save_adapter)"
        )


@dataclass(frozen=True)
class Place:
    """What of a leaf one tensor of a file is: its part at `at` (layer, expert), and as in `Row`."""

    leaf: Any
    at: tuple[int, ...] = ()
    transposed: bool = False
    wide: bool = False


def _places(model: Model, params: Tree) -> dict[str, Place]:
    """Where each HF tensor is."""
    leaves, table = flatten(params), rows(model.arch)
    places = {}
    for path, names in hf_names(model.arch, params).items():
        row, leaf = table[path_in_table(path)], leaves[path]
        # Layers, and experts where each is a tensor of its own.
        lead = base_of(leaf).shape[: path.startswith("layers/") + ("{e}" in row.hf)]
        for name, at in zip(names, np.ndindex(lead), strict=True):
            places[name] = Place(leaf, at, row.transposed, row.wide)
    return places


def _coded(places: dict[str, Place], dtype: str) -> dict[str, Place]:
    """Where the weights in codes are, by module."""
    found = {name.removesuffix(".weight"): place for name, place in _linears(places, dtype)}
    return {module: place for module, place in found.items() if isinstance(place.leaf, _CODES)}


def _of_all_experts(places: dict[str, Place], coded: dict[str, Place]) -> dict[str, Place]:
    """Where codes are that are one tensor of all experts of a layer, as gpt-oss has them."""
    return {
        name: place
        for name, place in places.items()
        if isinstance(place.leaf, _CODES) and name.removesuffix(".weight") not in coded
    }


def _is_mxfp4(leaf: Any) -> bool:
    return isinstance(leaf, Quantized) and leaf.format == "mxfp4"


def _linears(places: dict[str, Place], dtype: str) -> list[tuple[str, Place]]:
    return [
        (name, place)
        for name, place in places.items()
        if name.endswith(".weight") and len(_spec(place, dtype)[0]) == 2
    ]


def check_codes(model: Model, shapes: Tree, make: Callable[[Tree], Tree]) -> None:
    """UserError where `make` cannot make codes of params of these shapes, or no layout holds them.
    model, shapes: as of `abstract`; no weight is needed."""
    _layout(_places(model, jax.eval_shape(make, shapes)), "bfloat16")


def _layout(places: dict[str, Place], dtype: str) -> Writer:
    """How the weights are written; UserError where no layout holds them."""
    shapes = {}
    for name, place in _linears(places, dtype):
        coded = isinstance(place.leaf, _CODES)
        shapes[name.removesuffix(".weight")] = _one(place, abstract=True) if coded else None
    return writer(shapes, dtype)


def _one(place: Place, abstract: bool = False) -> Any:
    """A weight without its stack; abstract: its shapes."""
    lead = len(place.at)
    if abstract:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype), place.leaf)
    return jax.tree.map(lambda x: x[place.at], place.leaf)


def _write(
    model: Model,
    out: Path,
    specs: dict[str, Spec],
    tensor: Callable[[str], np.ndarray],
    dtype: str,
    tokenizer: Any,
    max_shard_bytes: int,
    extra: dict[str, Any] | None = None,
) -> None:
    """The folder: weights, tokenizer, configs with the `extra` fields."""
    source = None if model.source is None else find_model(model.source, weights=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_weights(out, specs, tensor, max_shard_bytes)
        write_tokenizer(out, source, tokenizer)
        write_configs(out, source, json.loads(model.arch.config) | (extra or {}), dtype)
    except OSError as error:
        raise UserError(f"{out}: the model cannot be written: {error}") from None


def _spec(place: Place, dtype: str | None) -> Spec:
    base = base_of(place.leaf)
    shape = tuple(base.shape[len(place.at) :])
    shape = (*shape[:-2], shape[-1], shape[-2]) if place.transposed else shape
    return shape, np.dtype("float32" if place.wide else dtype or base.dtype)


def _read(place: Place, dtype: np.dtype) -> np.ndarray:
    # A place is an argument, not a constant: one compilation serves all layers.
    return np.asarray(_tensor(place.leaf, np.asarray(place.at, np.int32), place.transposed, dtype))


@partial(jax.jit, static_argnums=(2, 3))
def _tensor(leaf: Any, at: jax.Array, transposed: bool, dtype: np.dtype) -> jax.Array:
    for i in at:
        leaf = jax.tree.map(lambda x, i=i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), leaf)
    x = (dense(leaf) if is_weight(leaf) else leaf).astype(dtype)
    return jnp.swapaxes(x, -1, -2) if transposed else x


def _widest(specs: dict[str, Spec]) -> str:
    return max((dtype for _, dtype in specs.values()), key=lambda dtype: dtype.itemsize).name
