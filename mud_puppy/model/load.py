"""`load`: a model from disk into (sharded) arrays; `abstract`: its shapes from the config alone.

Names, shapes and dtypes are checked before the first byte is read. Each leaf is then read into the
host buffers of its shards (`read.py`), so that the peak is the model and one block of rows.
"""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mud_puppy.errors import UserError, nearest
from mud_puppy.model.arch import Arch
from mud_puppy.model.families import Row, is_buffer, is_left_out, read_config, rows
from mud_puppy.model.files import find_model, open_tensors
from mud_puppy.model.gguf import open_gguf
from mud_puppy.model.gguf_codes import GgufCodes, say_decoded
from mud_puppy.model.hf_config import read_config_file, to_config
from mud_puppy.model.module import Model, axes, build, layout, path_in_table
from mud_puppy.model.names import flatten, hf_names, unflatten
from mud_puppy.model.quantized_files import Codes, take_config
from mud_puppy.model.read import blocks, read_leaf
from mud_puppy.model.tensors import DTYPES, Stored, check_float
from mud_puppy.parallel import shardings
from mud_puppy.weights.tree import stack

log = logging.getLogger("mud_puppy")

Tree = Any
Tensors = dict[str, Stored]


def load(
    source: str | Path,
    dtype: str | None = "bfloat16",
    mesh: Mesh | None = None,
    on_leaf: Callable[[str, jax.Array], Any] | None = None,
    trust_remote_code: bool = False,
    keep_codes: bool = False,
) -> tuple[Model, Tree]:
    """(model, params) from a folder of safetensors, a GGUF file or a hub id (`id@revision`).

    dtype: of every leaf; None keeps what is stored (GGUF: float32). mesh: shards the leaves by
    `parallel.rules`. on_leaf(path, array) replaces each tensor as it is read, e.g. by codes: paths
    look like "layers/0/0/self_attn/q_proj/weight", and come once for each layer of a stack, with
    the array of that layer; what is returned (arrays, or trees of one structure) is stacked, so
    that memory holds the result and one layer. trust_remote_code reaches the config only.
    keep_codes: the linears of a GGUF file stay in its codes (`gguf_codes`), as those of a quantized
    checkpoint always do; weights that are stored as floats alone are a UserError then. Whatever is
    wrong with the files is a UserError that names file and tensor.
    """
    check_dtype(dtype)
    path = find_model(source, code=trust_remote_code)
    if path.is_file():
        config, tensors = open_gguf(path)
    else:
        config, tensors = read_config_file(path, trust_remote_code), open_tensors(path)
    quantization = take_config(config)
    arch = _read_arch(config, path)
    model, shapes = build(arch, _lasting(source))
    tensors = _with_prefix(arch, tensors)
    names, structs = hf_names(arch, shapes), flatten(shapes)
    codes = _codes(path, quantization, keep_codes, names, tensors)
    _check(arch, names, structs, tensors, path, {} if codes is None else codes.parts)
    over = {} if mesh is None else flatten(shardings(mesh, axes(arch), shapes))
    table, leaves = rows(arch), {}
    for leaf, struct in structs.items():
        row, parts = table[path_in_table(leaf)], names[leaf]
        kind = "float32" if row.wide else dtype
        if codes is not None and codes.holds(leaf):
            kind = kind or tensors[names["final_norm"][0]].dtype.name
            made = codes.read(leaf, struct.shape, kind)
            made = made if on_leaf is None else (on_leaf(leaf, x) for x in made)
            leaves[leaf] = stack(made, struct.shape[0]) if _stacked(leaf) else next(iter(made))
            continue
        stored = [tensors[name] for name in parts]
        leaves[leaf] = _read(leaf, row, stored, struct.shape, kind, over.get(leaf), on_leaf)
    params = unflatten(shapes, leaves)
    if mesh is not None and (on_leaf is not None or codes is not None):
        params = jax.device_put(params, shardings(mesh, axes(arch), params))
    return model, params


def _read(
    leaf: str,
    row: Row,
    parts: list[Stored],
    shape: tuple[int, ...],
    dtype: str | None,
    place: NamedSharding | None,
    on_leaf: Callable[[str, jax.Array], Any] | None,
) -> Any:
    """A leaf of this shape from its tensors, which `on_leaf` then replaces layer by layer."""
    if on_leaf is None and not row.transposed:
        return read_leaf(parts, shape, dtype, place)

    def one(parts: list[Stored], shape: tuple[int, ...], place: NamedSharding | None) -> Any:
        if row.transposed:
            array = _swapped(read_leaf(parts, _swap(shape), dtype, place and _swap_place(place)))
        else:
            array = read_leaf(parts, shape, dtype, place)
        return array if on_leaf is None else on_leaf(leaf, array)

    if not _stacked(leaf):
        return one(parts, shape, place)
    # A layer at a time, and each put into the stack: the whole is never here twice.
    place = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    n, per = shape[0], len(parts) // shape[0]
    layers = (one(parts[i * per : (i + 1) * per], shape[1:], place) for i in range(n))
    return stack(layers, n)


def _swap(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _swap_place(place: NamedSharding) -> NamedSharding:
    return NamedSharding(place.mesh, PartitionSpec(*_swap(tuple(place.spec))))


@partial(jax.jit, donate_argnums=0)
def _swapped(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def abstract(
    source: Any, dtype: str = "bfloat16", trust_remote_code: bool = False
) -> tuple[Model, Tree]:
    """(model, ShapeDtypeStructs) as `load` gives arrays, from the config alone.

    source: as for `load`, or a transformers config, or the fields of a config.json.
    """
    check_dtype(dtype)
    if not isinstance(source, str | Path):
        config = to_config(copy.deepcopy(source))
        take_config(config)
        model, _ = build(read_config(config))
    else:
        path = find_model(source, weights=False, code=trust_remote_code)
        config = open_gguf(path)[0] if path.is_file() else read_config_file(path, trust_remote_code)
        take_config(config)
        model, _ = build(_read_arch(config, path), _lasting(source))
    table = rows(model.arch)

    def leaf(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        wide = table[path_in_table(path)].wide
        return jax.ShapeDtypeStruct(shape, jnp.dtype("float32" if wide else dtype))

    # As every tree that JAX has been through: names in order.
    return model, jax.tree.map(lambda shape: shape, layout(model.arch, leaf))


def stored_codes(source: str | Path, trust_remote_code: bool = False) -> str | None:
    """How a checkpoint whose weights are in codes calls their layout ("gptq", "bitsandbytes", ...);
    None for one in floats, and for GGUF files, which `load` decodes."""
    path = find_model(source, weights=False, code=trust_remote_code)
    found = None if path.is_file() else take_config(read_config_file(path, trust_remote_code))
    return None if found is None else str(found.get("quant_method"))


def check_dtype(dtype: str | None) -> None:
    """UserError unless `dtype` names a float dtype that weights can have (or is None)."""
    known = sorted(d.name for d in DTYPES.values())
    if dtype is not None and dtype not in known:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(known)}.{nearest(dtype, known)}")


def _lasting(source: str | Path) -> str:
    """The source as `Model` keeps it: a hub id, or a path that holds from any directory."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else str(source)


def _read_arch(config: Any, where: Path) -> Arch:
    try:
        return read_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _codes(
    path: Path, quantization: Any, keep: bool, names: dict[str, list[str]], tensors: Tensors
) -> Codes | GgufCodes | None:
    """What of the checkpoint is read as codes."""
    if quantization is not None:
        return Codes(path, quantization, names, tensors)
    if not keep:
        if path.is_file():
            say_decoded(path, tensors.values())
        return None
    if not path.is_file():
        raise UserError(
            f"{path}: the weights are stored as floats, there are no codes to keep; load without "
            "keep_codes (method qlora: name another quant_backend)"
        )
    return GgufCodes(path, names, tensors)


def _stacked(leaf: str) -> bool:
    return leaf.startswith("layers/")


def _check(
    arch: Arch,
    names: dict[str, list[str]],
    structs: dict[str, Any],
    tensors: Tensors,
    where: Path,
    coded: dict[str, list[str]],
) -> None:
    """Every tensor that the model needs is there in its shape, and none is left over. coded: the
    tensors that stand for a weight, whose shapes their layout knows."""
    table = rows(arch)
    for path, struct in structs.items():
        row = table[path_in_table(path)]
        expected = struct.shape[1:] if _stacked(path) else struct.shape
        expected = expected[1:] if "{e}" in row.hf else expected
        expected = _swap(expected) if row.transposed else expected
        for name in names[path]:
            if name in coded:
                continue
            if name not in tensors:
                raise UserError(
                    f"{where}: tensor '{name}' {expected} is missing: the checkpoint is "
                    f"incomplete, or its config is another model's"
                )
            check_float(tensors[name])
            if tensors[name].shape != expected:
                raise UserError(
                    f"{where}: tensor '{name}' has shape {tensors[name].shape}, "
                    f"but the config says {expected}"
                )
    used = {name for group in names.values() for name in group if name not in coded}
    used |= {part for parts in coded.values() for part in parts}
    unread = [name for name in tensors if name not in used and not is_buffer(name)]
    if left_out := [name for name in unread if is_left_out(arch, name)]:
        log.warning("%s: %d tensors are not read, as '%s'", where, len(left_out), left_out[0])
        unread = [name for name in unread if name not in left_out]
    head = f"{arch.modules[2]}.weight"
    if arch.tied and head in unread:
        _check_tied(tensors[head], tensors[names["embed"][0]], where)
        unread.remove(head)
    if unread:
        raise UserError(
            f"{where}: tensor '{unread[0]}' {tensors[unread[0]].shape} has no place in this "
            f"{arch.family} model ({len(unread)} such): its config is another model's"
        )


def _with_prefix(arch: Arch, tensors: Tensors) -> Tensors:
    """The tensors by their full names: files of a bare decoder leave out the first part ("model.",
    "transformer."), as those of GPT-2 do."""
    embed = f"{arch.modules[0]}.weight"
    prefix, _, bare = embed.partition(".")
    if embed in tensors or bare not in tensors:
        return tensors
    return {
        name if name.startswith(arch.modules[2]) else f"{prefix}.{name}": stored
        for name, stored in tensors.items()
    }


def _check_tied(head: Stored, embed: Stored, where: Path) -> None:
    """A tied model's file may hold its head too, but only as the same numbers."""
    same = head.shape == embed.shape and head.dtype == embed.dtype
    if same:
        pairs = zip(blocks(head), blocks(embed), strict=True)
        same = all(x.tobytes() == y.tobytes() for (_, x), (_, y) in pairs)
    if not same:
        raise UserError(
            f"{where}: the config ties the head to the embedding, but 'lm_head.weight' differs "
            "from it; set tie_word_embeddings to false in config.json"
        )
