"""Params to folders that other programs load: HF safetensors, full or with adapters merged.

Tensors go to disk one at a time, each gathered from its shards, merged and rounded just before.
"""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model.files import find_model
from mud_puppy.model.load import check_dtype
from mud_puppy.model.module import Model
from mud_puppy.model.names import flatten, hf_names
from mud_puppy.model.quantized_files import Writer, writer
from mud_puppy.model.save import Spec, write_configs, write_tokenizer, write_weights
from mud_puppy.weights import Int8Dynamic, Lora, base_of, dense, is_weight
from mud_puppy.weights.tree import under_rounding

Tree = Any

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
    specs = {name: _spec(*place, dtype) for name, place in places.items()}

    def tensor(name: str) -> np.ndarray:
        return np.asarray(_tensor(*places[name], specs[name][1]))

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
    how; what is no `Quantized` in `dtype`. UserError for adapters, and where a layout cannot hold a
    format.
    """
    check_dtype(dtype)
    _refuse_adapters(params)
    places = _places(model, params)
    coded = _coded(places, dtype)
    layout = layout or _layout(places, dtype)
    packed = lru_cache(maxsize=1)(lambda module: layout.pack(_one(*coded[module])))
    specs: dict[str, Spec] = {}
    of: dict[str, tuple[str, str]] = {}
    for name, place in places.items():
        module = name.removesuffix(".weight")
        if module not in coded:
            specs[name] = _spec(*place, dtype)
            continue
        # Each is packed, here and again to be written: texts in a layout have lengths of their own.
        for suffix, array in packed(module).items():
            specs[f"{module}.{suffix}"] = array.shape, array.dtype
            of[f"{module}.{suffix}"] = module, suffix

    def tensor(name: str) -> np.ndarray:
        if name in of:
            module, suffix = of[name]
            return packed(module)[suffix]
        return np.asarray(_tensor(*places[name], specs[name][1]))

    extra = {"quantization_config": layout.config}
    _write(model, Path(out).expanduser(), specs, tensor, dtype, tokenizer, max_shard_bytes, extra)


def _refuse_adapters(params: Tree) -> None:
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    if any(isinstance(under_rounding(w), Lora) for w in leaves):
        raise UserError(
            "these params have adapters: merge them first (merge_lora), or write the adapter alone "
            "(save_adapter)"
        )


Place = tuple[Any, int | None]  # a leaf, and which layer of it


def _places(model: Model, params: Tree) -> dict[str, Place]:
    """Where each HF tensor is."""
    leaves = flatten(params)
    return {
        name: (leaves[path], layer if path.startswith("layers/") else None)
        for path, names in hf_names(model.arch, params).items()
        for layer, name in enumerate(names)
    }


def _coded(places: dict[str, Place], dtype: str) -> dict[str, Place]:
    """Where the weights in codes are, by module."""
    found = {name.removesuffix(".weight"): place for name, place in _linears(places, dtype)}
    return {module: place for module, place in found.items() if isinstance(place[0], _CODES)}


def _linears(places: dict[str, Place], dtype: str) -> list[tuple[str, Place]]:
    return [
        (name, place)
        for name, place in places.items()
        if name.endswith(".weight") and len(_spec(*place, dtype)[0]) == 2
    ]


def check_codes(model: Model, shapes: Tree, make: Callable[[Tree], Tree]) -> None:
    """UserError where `make` cannot make codes of params of these shapes, or no layout holds them.
    model, shapes: as of `abstract`; no weight is needed."""
    _layout(_places(model, jax.eval_shape(make, shapes)), "bfloat16")


def _layout(places: dict[str, Place], dtype: str) -> Writer:
    """How the weights are written; UserError where no layout holds them."""
    shapes = {}
    for name, place in _linears(places, dtype):
        coded = isinstance(place[0], _CODES)
        shapes[name.removesuffix(".weight")] = _one(*place, abstract=True) if coded else None
    return writer(shapes, dtype)


def _one(leaf: Any, layer: int | None, abstract: bool = False) -> Any:
    """A weight without its stack; abstract: its shapes."""
    if layer is None:
        return leaf
    if abstract:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), leaf)
    return jax.tree.map(lambda x: x[layer], leaf)


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


def _spec(leaf: Any, layer: int | None, dtype: str | None) -> Spec:
    base = base_of(leaf)
    shape = base.shape if layer is None else base.shape[1:]
    return tuple(shape), np.dtype(dtype or base.dtype)


@partial(jax.jit, static_argnums=2)
def _tensor(leaf: Any, layer: Any, dtype: np.dtype) -> jax.Array:
    # The layer's number is an argument, not a constant: one compilation serves all layers.
    if layer is not None:
        leaf = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), leaf)
    return (dense(leaf) if is_weight(leaf) else leaf).astype(dtype)


def _widest(specs: dict[str, Spec]) -> str:
    return max((dtype for _, dtype in specs.values()), key=lambda dtype: dtype.itemsize).name
