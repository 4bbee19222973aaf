"""`Model`: an architecture with its Flax skeleton, and the calls that users make.

The canonical value is the params tree (nested dicts and lists of weights), so that every transform
is `params -> params`. Flax is a thin skeleton beside it: `Decoder` is an `nnx.Module` whose
`nnx.Param`s are the same leaves, and `model.skeleton` its GraphDef, for those who want to merge
params into a module and use it with other Flax code.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mud_puppy.model.arch import Arch, Layer
from mud_puppy.model.balance import router_losses
from mud_puppy.model.decoder import Cache, Inputs, decode, outputs, scan_layers
from mud_puppy.model.families import FAMILIES, Row, rows
from mud_puppy.weights.peft_names import PeftNames
from mud_puppy.weights.tree import stack

Tree = Any


@dataclass(frozen=True)
class Model:
    """Hashable, holds no arrays, static under jit.

    dtype: what activations are computed in; None: the dtype of the embedding. source: the folder
    that the model was read from (its tokenizer and generation_config go along at export). tile:
    tokens that projections and MLP take at a time where there is no cache (`tile.over_tiles`).
    """

    arch: Arch
    skeleton: nnx.GraphDef
    dtype: str | None = None
    source: str | None = None
    tile: int | None = None

    @property
    def peft_names(self) -> PeftNames:
        """What PEFT calls the modules: `save_adapter`'s."""
        family = FAMILIES[self.arch.family]
        stacked = [path for path in family.linears(self.arch) if path in family.stacked]
        return PeftNames(
            *self.arch.modules,
            conv1d=bool(family.transposed - family.stacked),
            stacked=tuple(path.split("/")[-1] for path in stacked),
            task=self.arch.task,
        )

    def __call__(
        self,
        params: Tree,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32; of a classification model the scores [B, T, labels] at every position: a
        sequence's own is that of its last token."""
        return _outputs(self, params, Inputs(tokens, positions, segment_ids))

    def forward(
        self,
        params: Tree,
        inputs: Inputs,
        cache: Cache | None = None,
        run_layers: Callable = scan_layers,
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, tuple[Array, Array]]]:
        """Hidden states after the final norm, the updated cache, and auxiliary sums by name: of
        models with experts `load_balance` and `router_z` (`balance.router_losses`)."""
        hidden, cache, routed = decode(
            self.arch, params, inputs, cache, run_layers, self.dtype, self.tile
        )
        return hidden, cache, router_losses(routed)


# Compiled: run eagerly, every call would trace and compile the scan over the layers again.
@partial(jax.jit, static_argnums=0)
def _outputs(model: Model, params: Tree, inputs: Inputs) -> Float[Array, "B T V"]:
    hidden, _, _ = model.forward(params, inputs)
    return outputs(model.arch, params, hidden)


class Decoder(nnx.Module):
    """The params tree as a Flax module: `Decoder(tree)(tokens)`."""

    def __init__(self, arch: Arch, params: Tree):
        self.arch = arch
        self.params = _wrap(params)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        params = params_of(self)
        hidden, *_ = decode(self.arch, params, Inputs(tokens), None, scan_layers)
        return outputs(self.arch, params, hidden)


class _Node(nnx.Module):
    def __init__(self, tree: dict[str, Tree]):
        for name, child in tree.items():
            setattr(self, name, _wrap(child))


def _wrap(tree: Tree) -> Any:
    if isinstance(tree, dict):
        return _Node(tree)
    if isinstance(tree, list):
        return nnx.List([_wrap(child) for child in tree])
    return nnx.Param(tree)


def params_of(module: Decoder) -> Tree:
    """The params tree of a Flax decoder: the inverse of `Decoder(arch, params)`."""
    return _lists(nnx.to_pure_dict(nnx.state(module, nnx.Param))["params"])


def _lists(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    children = {name: _lists(child) for name, child in tree.items()}
    return list(children.values()) if all(isinstance(name, int) for name in children) else children


def build(arch: Arch, source: str | None = None) -> tuple[Model, Tree]:
    """(model, ShapeDtypeStructs of its params in float32)."""
    shapes = layout(arch, lambda path, shape: jax.ShapeDtypeStruct(shape, jnp.float32))
    module = nnx.eval_shape(lambda: Decoder(arch, jax.tree.map(_zeros, shapes)))
    return Model(arch, nnx.split(module)[0], source=source), shapes


def _zeros(leaf: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(leaf.shape, leaf.dtype)


def layout(arch: Arch, leaf: Callable[[str, tuple[int, ...]], Any]) -> Tree:
    """The params tree of `arch` with `leaf(path, shape)` at each leaf.

    The path of a stacked leaf is "layers/<group>/<block>/self_attn/q_proj/weight".
    """
    tree: dict[str, Any] = {}
    for path, row in rows(arch).items():
        shape = tuple(arch.sizes[axis] for axis in row.axes)
        if not path.startswith("layers/"):
            _insert(tree, path, leaf(path, shape))
            continue
        groups = tree.setdefault("layers", [[{} for _ in range(p)] for p, _ in arch.groups])
        inner, start = path.removeprefix("layers/"), 0
        for g, (p, n) in enumerate(arch.groups):
            for j in range(p):
                if has(arch.kinds[start + j], row):
                    _insert(groups[g][j], inner, leaf(f"layers/{g}/{j}/{inner}", (n, *shape)))
            start += p * n
    return tree


def has(kind: Layer, row: Row) -> bool:
    """Whether a layer of this kind has the row's leaf."""
    return row.sparse is None or row.sparse == kind.sparse


def _insert(tree: Tree, path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def axes(arch: Arch) -> Tree:
    """Logical axes of every leaf, as the layout's tree of tuples; "layers" is the stack's axis."""
    table = rows(arch)

    def leaf(path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        own = table[path_in_table(path)].axes
        return ("layers", *own) if path.startswith("layers/") else own

    return layout(arch, leaf)


def path_in_table(path: str) -> str:
    """ "layers/0/0/mlp_norm" -> "layers/mlp_norm": the row of a leaf."""
    parts = path.split("/")
    return "/".join(["layers", *parts[3:]]) if parts[0] == "layers" else path


def init(
    arch: Arch,
    key: PRNGKeyArray,
    dtype: Any = jnp.float32,
    on_leaf: Callable[[str, Array], Any] | None = None,
) -> Tree:
    """Random params: matrices normal with the config's std, norms one (Gemma's, which add one,
    zero), biases zero.

    Leaf by leaf, so that no more than one leaf exists in float32 beside the result; with `on_leaf`,
    which is `load`'s, one layer of it.
    """
    count, table = itertools.count(), rows(arch)

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        ones = jnp.zeros if arch.norm_offset else jnp.ones
        fill = {"norm": ones, "bias": jnp.zeros}.get(path[-4:])
        own = key if fill else jax.random.fold_in(key, next(count))
        kind = jnp.dtype("float32" if table[path_in_table(path)].wide else dtype)

        def values(own: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
            return fill(shape, kind) if fill else _normal(own, shape, arch.init_std, kind)

        if on_leaf is None:
            return values(own, shape)
        if not path.startswith("layers/"):
            return on_leaf(path, values(own, shape))
        keys = (jax.random.fold_in(own, r) for r in range(shape[0]))
        return stack((on_leaf(path, values(k, shape[1:])) for k in keys), shape[0])

    return layout(arch, leaf)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float, dtype: Any) -> Array:
    return (jax.random.normal(key, shape) * std).astype(dtype)
