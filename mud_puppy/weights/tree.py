"""Walking a params tree: module names, groups of layers, and the train/frozen partition.

A params tree is a nested dict of weights (see `docs/architecture.md`). `params["layers"]` is a list
of groups, a group a list of p blocks whose leaves are stacked over n repeats; layer number
`start + r * p + j` is repeat r of block j. Modules carry the names that Hugging Face and PEFT use.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mud_puppy.kernels import Quantized
from mud_puppy.weights.leaf import FakeQuant, Fp8, Int8Dynamic, Lora, base_of, is_weight

Tree = Any
Path = tuple[str, ...]

# What trains whole beside adapters: it is new, or belongs to them (PEFT's `modules_to_save`).
_TRAINED = ("score",)
_TOP = {"embed": "model.embed_tokens", "head": "lm_head"}


def repeats(group: list[Tree]) -> int:
    """n, the leading axis of every leaf of a group."""
    return jax.tree.leaves(group)[0].shape[0]


def at_repeat(group: list[Tree], r: Any) -> list[Tree]:
    """Repeat r (an int32 scalar) of a group, without its leading axis.

    Codes stay in their stack (`Quantized.layer`): a kernel reads them there, and XLA would copy a
    slice first, which costs more than a product with a few rows does.
    """
    return jax.tree.map(lambda w: _at_repeat(w, r), group, is_leaf=is_weight)


def _at_repeat(w: Any, r: Any) -> Any:
    if isinstance(w, Quantized):
        return replace(w, layer=r)
    if isinstance(w, Lora | FakeQuant | Fp8 | Int8Dynamic):
        own = jax.tree.map(lambda x: _at_repeat(x, r), replace(w, base=None))
        return replace(own, base=_at_repeat(w.base, r))
    return jax.lax.dynamic_index_in_dim(w, r, keepdims=False)


def stack(layers: Iterable[Tree], n: int) -> Tree:
    """n trees of one structure as one with a leading axis, each dropped when it is in its place."""
    whole: Tree = None
    for r, layer in enumerate(layers):
        if whole is None:
            whole = jax.tree.map(partial(_stack_of, n), layer)
        whole = _put(whole, layer, r)
    return whole


def _stack_of(n: int, x: Array) -> Array:
    """Zeros [n, *x.shape] on x's devices."""
    place = x.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
    return jnp.zeros((n, *x.shape), x.dtype, device=place)


@partial(jax.jit, donate_argnums=0)
def _put(whole: Tree, layer: Tree, r: Any) -> Tree:
    return jax.tree.map(
        lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, r, 0), whole, layer
    )


def spans(params: Tree) -> Iterator[tuple[list[Tree], int]]:
    """(group, number of its first layer) in order."""
    start = 0
    for group in params["layers"]:
        yield group, start
        start += len(group) * repeats(group)


def linear_paths(block: Tree, prefix: Path = ()) -> list[Path]:
    """Paths of the linear modules of one block: ("self_attn", "q_proj"), ..."""
    found = []
    for name, child in block.items():
        if isinstance(child, dict):
            own = (*prefix, name)
            found += [own] if "weight" in child else linear_paths(child, own)
    return found


def layer_module(path: Path, layer: int, expert: int | None = None) -> str:
    """HF's name of a module of one layer, or of one of its experts."""
    if expert is not None:
        at = path.index("experts") + 1
        path = (*path[:at], str(expert), *path[at:])
    return ".".join(("model.layers", str(layer), *path))


def _modules(block: Tree, path: Path, layer: int) -> list[str]:
    """The names of what one layer has at a path: a module, or one for each expert."""
    if "experts" not in path:
        return [layer_module(path, layer)]
    count = base_of(at_path(block, path)["weight"]).shape[-3]
    return [layer_module(path, layer, e) for e in range(count)]


def is_expert(name: str) -> bool:
    """Whether a module's name is that of one expert's."""
    return ".experts." in name


def at_path(tree: Tree, path: Path) -> Tree:
    """The subtree at a path."""
    for name in path:
        tree = tree[name]
    return tree


def with_path(tree: Tree, path: Path, value: Tree) -> Tree:
    """The tree with another subtree at a path."""
    if not path:
        return value
    return {**tree, path[0]: with_path(tree[path[0]], path[1:], value)}


def module_names(params: Tree) -> list[str]:
    """HF's names of every module that an adapter can sit on."""
    names = [_TOP[name] for name in _TOP if name in params]
    for group, start in spans(params):
        for r in range(repeats(group)):
            for j, block in enumerate(group):
                layer = start + r * len(group) + j
                for path in linear_paths(block):
                    names += _modules(block, path, layer)
    return names


def map_modules(
    fn: Callable[[list[str], Any], Any], key: Callable[[str], Any], params: Tree
) -> Tree:
    """Replaces each linear weight w by fn(names of its stacked modules, w); those of experts come
    layer by layer.

    Groups are split first where `key(name)` differs between the repeats of one module, so that all
    modules of one weight have the same key. `embed` and `head` are visited too, as stacks of one
    name without a layer axis.
    """
    out = dict(params)
    for name in _TOP:
        if name in params:
            out[name] = fn([_TOP[name]], params[name])
    out["layers"] = [
        [_map_block(fn, block, start, j, len(part)) for j, block in enumerate(part)]
        for group, first in spans(params)
        for part, start in _split(key, group, first)
    ]
    return out


def _map_block(fn: Callable, block: Tree, start: int, j: int, p: int) -> Tree:
    n = repeats([block])
    for path in linear_paths(block):
        layers = (_modules(block, path, start + r * p + j) for r in range(n))
        names = list(itertools.chain.from_iterable(layers))
        module = at_path(block, path)
        block = with_path(block, path, {**module, "weight": fn(names, module["weight"])})
    return block


def _split(key: Callable, group: list[Tree], start: int) -> list[tuple[list[Tree], int]]:
    p, n = len(group), repeats(group)

    def signature(r: int) -> list[Any]:
        return [
            key(name)
            for j, block in enumerate(group)
            for path in linear_paths(block)
            for name in _modules(block, path, start + r * p + j)
        ]

    cuts = [r for r in range(n) if r == 0 or signature(r) != signature(r - 1)] + [n]
    if len(cuts) == 2:
        return [(group, start)]
    return [
        (jax.tree.map(lambda x, a=a, b=b: x[a:b], group), start + a * p)
        for a, b in itertools.pairwise(cuts)
    ]


def partition(params: Tree) -> tuple[Tree, Tree]:
    """(train, frozen), each the tree of `params` with None where the other has the leaf.

    With adapters in the tree, the outermost adapters train (a, b, magnitude), unless they are
    marked frozen, and the learned ranges of a `FakeQuant`, and all else is frozen; without any,
    everything trains but codes. A head of scores (`model.score_head`) trains in any case.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    if not any(isinstance(under_rounding(leaf), Lora) for leaf in leaves):
        floats = jax.tree.map(lambda w: _hole(w) if _coded(w) else w, params, is_leaf=is_weight)
        codes = jax.tree.map(lambda w: w if _coded(w) else _hole(w), params, is_leaf=is_weight)
        return floats, codes
    own = {name: params[name] for name in _TRAINED if name in params}
    train = jax.tree.map(_train_part, params, is_leaf=is_weight) | own
    frozen = jax.tree.map(_frozen_part, params, is_leaf=is_weight) | _hole(own)
    return train, frozen


def combine(train: Tree, frozen: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, train, frozen, is_leaf=lambda x: x is None
    )


def _hole(w: Any) -> Any:
    return jax.tree.map(lambda x: None, w)


def _coded(w: Any) -> bool:
    return isinstance(base_of(w), Quantized)


def under_rounding(w: Any) -> Any:
    """The weight or adapter that a `FakeQuant` rounds; any other leaf itself."""
    return w.base if isinstance(w, FakeQuant) else w


def _train_part(w: Any) -> Any:
    if isinstance(w, FakeQuant):
        return replace(w, base=_train_part(w.base))
    if not isinstance(w, Lora):
        return None
    if w.frozen:
        return jax.tree.map(lambda x: None, w)
    return replace(w, base=jax.tree.map(lambda x: None, w.base), scale=None, key=None)


def _frozen_part(w: Any) -> Any:
    if isinstance(w, FakeQuant):
        return replace(w, base=_frozen_part(w.base), range=None)
    if not isinstance(w, Lora) or w.frozen:
        return w
    return replace(w, a=None, b=None, magnitude=None)
