"""For `jax.shard_map` that checks how arrays vary over the mesh: what a custom VJP asks of them."""

from typing import Any

import jax


def alike(args: Any) -> Any:
    """The tree of arrays, each varying over the axes that any of them varies over.

    Cotangents of a custom VJP must vary as its arguments do. What is the same on all devices is
    cast before it enters, so that JAX sums its gradient over them. Elsewhere nothing is done.
    """
    leaves, tree = jax.tree.flatten(args)
    own = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    axes = frozenset[Any]().union(*own)
    return tree.unflatten(
        jax.lax.pcast(x, tuple(axes - has), to="varying") if axes - has else x
        for x, has in zip(leaves, own, strict=True)
    )
