"""A training state as Orbax and JSON hold it: flat named arrays, and a record of what they were.

Orbax needs an abstract target to give back anything but dicts and lists, knows no None holes, and
its own message for a state of another shape is a traceback. So a state is flattened here: every
array leaf gets its path as a name ("train/layers/0/self_attn/q_proj/weight/a"), Python scalars go
into the JSON record, and the structure comes back from the target of the restore. Nothing here
touches a file.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mud_puppy.errors import UserError

SCALARS = (bool, int, float, str)


def pack(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`state` as ({name: array}, record), where record is JSON: leaf types, scalars, key kinds.

    Typed random keys become their uint32 data. An array without elements is only recorded, because
    Orbax refuses it.
    """
    arrays = {}
    record = {"leaves": {}, "scalars": {}, "keys": {}}
    for name, leaf in _named(state):
        record["leaves"][name] = describe(leaf)
        if type(leaf) in SCALARS:
            record["scalars"][name] = leaf
            continue
        if _is_key(leaf):
            record["keys"][name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if leaf.size:
            arrays[name] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    return arrays, record


def requests(target: Any) -> tuple[dict[str, Any], dict[str, ocp.RestoreArgs]]:
    """What Orbax shall read for `target`: ({name: shape and dtype}, {name: where to put it}).

    Sharded leaves are read shard by shard; leaves without a sharding are read as numpy.
    """
    shapes, places = {}, {}
    for name, leaf in _named(target):
        if type(leaf) in SCALARS or math.prod(leaf.shape) == 0:
            continue
        place, data = _sharding(leaf), _data(leaf)
        shapes[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place)
        if place is None:
            places[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            places[name] = ocp.ArrayRestoreArgs(sharding=place, global_shape=data.shape)
    return shapes, places


def unpack(target: Any, arrays: dict[str, Any], record: dict[str, Any]) -> Any:
    """The inverse of `pack` in the structure of `target`, from what Orbax read for `requests`."""

    def leaf_of(name: str, leaf: Any) -> Any:
        if type(leaf) in SCALARS:
            return record["scalars"][name]
        if name in arrays:
            array = arrays[name]
        else:
            data = _data(leaf)
            array = jax.device_put(np.zeros(data.shape, data.dtype), _sharding(leaf))
        if isinstance(leaf, (np.ndarray, np.generic)):
            return np.asarray(array)[()] if isinstance(leaf, np.generic) else np.asarray(array)
        array = jnp.asarray(array)  # read as numpy: uncommitted now, as jnp.zeros would be
        if _is_key(leaf):
            return jax.random.wrap_key_data(array, impl=record["keys"][name])
        return array

    leaves = [leaf_of(name, leaf) for name, leaf in _named(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def check_fit(record: dict[str, Any], target: Any, where: str) -> None:
    """Raises a UserError that names the first leaf in which checkpoint `where` and `target` differ.

    record: as `pack` made it. The message gives both types, "absent" for a leaf that only one has.
    """
    there = record["leaves"]
    here = {name: describe(leaf) for name, leaf in _named(target)}
    for name in [*here, *there]:
        saved, wanted = there.get(name, "absent"), here.get(name, "absent")
        if saved != wanted:
            raise UserError(
                f"{where} does not fit this run: {name} is {saved} in the checkpoint and {wanted} "
                "here. Resume with the model, method, LoRA settings, precision and optimizer that "
                "wrote it, or train into another output folder."
            )


def describe(leaf: Any) -> str:
    """`float32[2,8]`, `key<fry>[]` or `int`.

    >>> describe(np.zeros((2, 8), np.float32)), describe(3)
    ('float32[2,8]', 'int')
    """
    if type(leaf) in SCALARS:
        return type(leaf).__name__
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of `tree` with their paths; ValueError if two paths read the same."""
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if len(dict(pairs)) != len(pairs):
        raise ValueError("two leaves of the state have one path: a dict key holds a '/'")
    return pairs


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    """What is stored for an array leaf: itself, or the shape and dtype of a random key's data."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where the leaf must lie; None for numpy, for no sharding and for an uncommitted array."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return None
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return leaf.sharding
