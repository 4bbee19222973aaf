"""Leaves of a params tree by path, and the HF tensor names that each path stands for."""

from typing import Any

from mud_puppy.model.arch import Arch
from mud_puppy.model.families import rows
from mud_puppy.model.module import path_in_table
from mud_puppy.weights.tree import repeats, spans

Tree = Any


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """{"layers/0/0/mlp/up_proj/weight": leaf}; a weight such as `Lora` is one leaf."""
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list):
        children = enumerate(tree)
    else:
        return {prefix: tree}
    start = f"{prefix}/" if prefix else ""
    parts = [flatten(child, f"{start}{name}") for name, child in children]
    return {path: leaf for part in parts for path, leaf in part.items()}


def unflatten(like: Tree, leaves: dict[str, Any], prefix: str = "") -> Tree:
    """The tree of `like` with the leaves of a `flatten`ed dict."""
    start = f"{prefix}/" if prefix else ""
    if isinstance(like, dict):
        return {name: unflatten(child, leaves, f"{start}{name}") for name, child in like.items()}
    if isinstance(like, list):
        return [unflatten(child, leaves, f"{start}{i}") for i, child in enumerate(like)]
    return leaves[prefix]


def hf_names(arch: Arch, params: Tree) -> dict[str, list[str]]:
    """The HF tensors of each leaf: one, or one for each layer of a stack; of experts that are
    stored one by one, those of the first layer, then those of the next.

    Reads the groups that `params` has, which adapters may have split since it was loaded.
    """
    table = rows(arch)
    groups = list(spans(params))

    def names(path: str) -> list[str]:
        row = table[path_in_table(path)]
        own = range(arch.sizes[row.axes[0]]) if "{e}" in row.hf else (0,)
        if not path.startswith("layers/"):
            return [row.hf]
        _, g, j, *_ = path.split("/")
        group, start = groups[int(g)]
        layers = [start + r * len(group) + int(j) for r in range(repeats(group))]
        return [row.hf.format(i=layer, e=e) for layer in layers for e in own]

    return {path: names(path) for path in flatten(params)}
