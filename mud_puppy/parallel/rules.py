"""One table from logical axes of weights to mesh axes, and the shardings that follow from it."""

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mud_puppy.kernels import Quantized
from mud_puppy.weights import FakeQuant, Fp8, Int8Dynamic, Lora, is_weight

Tree = Any
log = logging.getLogger("mud_puppy")

# Every matrix has `embed` on one side, or is made from a latent vector.
RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "positions": None,
    "embed": "fsdp",
    "mlp": None,
    "gate_up": None,
    "heads": None,
    "kv_heads": None,
    "qkv": None,
    "head": None,
    "kv_head": None,
    "head_dim": None,
    "rank": None,
    "one": None,
    "labels": None,
    "experts": None,
    "expert_mlp": None,
    "expert_gate_up": None,
    "shared_mlp": None,
    "q_rank": None,
    "q_latent": "fsdp",
    "kv_rank": "fsdp",
    "kv_rank_rotated": None,
    "keys_values": None,
    "values": None,
}

# The batch is split over all axes; sequences are whole on a device.
BATCH = PartitionSpec(("data", "fsdp"))


def weight_sharding(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one dense weight. A dimension that the mesh does not divide stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        over = RULES[axis]
        if over is not None and size % mesh.shape[over]:
            _say_once(f"a '{axis}' axis of {size} is not split over {mesh.shape[over]} devices")
            over = None
        spec.append(over)
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(mesh: Mesh, axes: Tree, params: Tree) -> Tree:
    """Shardings of `params` (arrays or shapes), an adapter's from those of the weight under it.

    `axes` is `model.axes(arch)`'s tree of tuples; groups of layers may have been split since.
    """
    return {
        name: _groups(mesh, axes[name], child) if name == "layers"
        else _tree(mesh, axes[name], child)
        for name, child in params.items()
    }  # fmt: skip


def _groups(mesh: Mesh, axes: list[list[Tree]], groups: list[list[Tree]]) -> list[list[Tree]]:
    # A path has the same axes in every block that has it.
    block_axes: Tree = {}
    for block in (block for group in axes for block in group):
        block_axes = _merged(block_axes, block)
    return [[_tree(mesh, block_axes, block) for block in group] for group in groups]


def _merged(a: Tree, b: Tree) -> Tree:
    if not isinstance(a, dict):
        return a
    return {**b, **{name: _merged(child, b.get(name, child)) for name, child in a.items()}}


def _tree(mesh: Mesh, axes: Tree, params: Tree) -> Tree:
    if isinstance(axes, dict):
        return {name: _tree(mesh, axes[name], child) for name, child in params.items()}
    return _leaf(mesh, axes, params)


def _leaf(mesh: Mesh, axes: tuple[str, ...], w: Any) -> Any:
    if not is_weight(w):
        return None if w is None else weight_sharding(mesh, axes, w.shape)
    # Layers, and experts.
    *stack, out_axis, in_axis = axes

    def part(x: Any, *own: str) -> Any:
        return None if x is None else weight_sharding(mesh, (*stack, *own), x.shape)

    if isinstance(w, Quantized):
        names = "codes", "scales", "zeros", "minimum"
        split = {name: part(getattr(w, name), out_axis, in_axis) for name in names}
        # A doubly quantized scale's absmax is shared by 256 scales of whatever rows: one copy each.
        own = None if w.nested is None else part(w.nested, "rank")
        return replace(w, **split, nested=own, offset=part(w.offset))
    if isinstance(w, Fp8):
        base = None if w.base is None else _leaf(mesh, axes, w.base)
        return replace(w, base=base, scale=part(w.scale))
    if isinstance(w, FakeQuant | Int8Dynamic):
        w = replace(w, base=None if w.base is None else _leaf(mesh, axes, w.base))
        if isinstance(w, Int8Dynamic):
            return w
        return replace(w, range=part(w.range, out_axis, in_axis))
    assert isinstance(w, Lora)
    return replace(
        w,
        base=None if w.base is None else _leaf(mesh, axes, w.base),
        a=part(w.a, "rank", in_axis),
        b=part(w.b, out_axis, "rank"),
        scale=part(w.scale),
        magnitude=part(w.magnitude, out_axis),
        key=part(w.key),
    )


def split_batch(x: Array) -> Array:
    """Keeps activations [B, ...] split over the batch on the ambient mesh (`jax.set_mesh`).

    Without this XLA may choose to split the width and gather the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def split_lookup(x: Array) -> Array:
    """Rows [B, T, D] from a table that is split over its width: batch over data, width over fsdp.

    `split_batch` is one all-to-all from there. Without this, on a mesh with both axes, XLA gathers
    the whole batch's gradient on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % mesh.size or x.shape[2] % mesh.shape["fsdp"]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))


def like(leaf_shardings: Tree, shapes: Tree, otherwise: NamedSharding) -> Tree:
    """Shardings for a tree that repeats another tree inside it (optimizer moments): a leaf at the
    same inner path gets the same sharding when its shape allows it, others get `otherwise`."""
    table = {
        jax.tree_util.keystr(path): sharding
        for path, sharding in jax.tree.leaves_with_path(leaf_shardings)
    }

    def find(path: tuple, leaf: Any) -> NamedSharding:
        inner = (table.get(jax.tree_util.keystr(path[i:])) for i in range(len(path)))
        found = next((sharding for sharding in inner if sharding is not None), otherwise)
        return found if _divides(found, leaf.shape) else otherwise

    return jax.tree.map_with_path(find, shapes)


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether every dimension that is split is a multiple of its devices (of RULES: one axis)."""
    spec = sharding.spec
    return len(spec) <= len(shape) and not any(
        size % sharding.mesh.shape[axis] for axis, size in zip(spec, shape, strict=False) if axis
    )


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """For an array [A, B, ...] of accumulation steps of a batch: B is split."""
    return NamedSharding(mesh, PartitionSpec(None, *BATCH, *(None,) * (rank - 2)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_devices(mesh: Mesh) -> int:
    """How many devices share a batch; batch sizes are multiples of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@cache
def _say_once(message: str) -> None:
    log.warning("sharding: %s; it is copied to each", message)
