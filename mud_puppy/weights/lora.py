"""LoRA as parameter transforms: add, merge, strip, dropout keys. Each is `params -> params`.

Names, defaults and initialisation follow PEFT, so that an adapter made here is one that PEFT would
have made: a ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming, a = sqrt 5), b = 0, scale = alpha / rank, or
alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732); DoRA's magnitude starts as the row norms.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mud_puppy.errors import UserError, nearest
from mud_puppy.weights.leaf import FakeQuant, Lora, base_of, is_weight
from mud_puppy.weights.linear import dense
from mud_puppy.weights.peft_names import ours
from mud_puppy.weights.tree import Tree, is_expert, map_modules, module_names

ALL_LINEAR = "all-linear"


def add_lora(
    params: Tree,
    rank: int = 16,
    alpha: int | float = 32,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    key: PRNGKeyArray,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
) -> Tree:
    """Puts a fresh adapter on each target weight; on a weight with an adapter, one above it.

    targets: "all-linear" (every linear of every layer, those of experts too; not embedding, head
    and routers), or names and
    regular expressions, each matched against the end of a module's name (`q_proj`,
    `3.self_attn.q_proj`) or, as a regular expression, against all of it. A target that matches no
    module is a UserError.
    """
    if rank < 1:
        raise UserError(f"LoRA rank must be at least 1, not {rank}")
    chosen = match_targets(module_names(params), targets)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank

    def adapt(names: list[str], w: Any) -> Any:
        if names[0] not in chosen:
            return w
        if dora and is_expert(names[0]):
            raise UserError(
                f"DoRA of experts ('{names[0]}') is not here: name targets without them, such as "
                "q_proj, k_proj, v_proj, o_proj"
            )
        if dora and names[0] == "model.embed_tokens":
            raise UserError("DoRA is not defined for embeddings; leave embed_tokens out of targets")
        # crc32: the same seed in every process, whatever order modules are visited in.
        own = jax.random.fold_in(key, zlib.crc32(names[0].encode()))
        return _fresh(w, rank, scale, own, dropout, dora)

    return map_modules(adapt, chosen.__contains__, params)


def match_targets(
    names: list[str], targets: str | Sequence[str], of: str = "LoRA"
) -> frozenset[str]:
    """The module names that `targets` selects; see `add_lora`. of: whose targets, for messages."""
    if targets == ALL_LINEAR:
        return frozenset(name for name in names if ".layers." in name)
    targets = [targets] if isinstance(targets, str) else list(targets)
    hits = {target: [n for n in names if _selects(target, n, of)] for target in targets}
    if missing := [target for target, found in hits.items() if not found]:
        known = sorted({name.split(".")[-1] for name in names})
        if "lm_head" in missing and "lm_head" not in known:
            raise UserError(
                f"{of} target 'lm_head': this model's head is tied to its embedding; leave it out"
            )
        raise UserError(
            f"{of} target '{missing[0]}' matches no module.{nearest(missing[0], known)} "
            f"Modules: {', '.join(known)}"
        )
    chosen = frozenset(name for found in hits.values() for name in found)
    _check_experts(names, chosen, of)
    if "model.embed_tokens" in chosen and "lm_head" not in names:
        raise UserError(
            f"{of} target 'embed_tokens': this model's embedding is tied to its head; leave it out"
        )
    return chosen


def _selects(target: str, name: str, of: str) -> bool:
    """Whether a target means the module: by our name or by HF's in its family ("transformer.h.0.
    attn.c_attn"), an expert's also without its number, as PEFT's `target_parameters` say it."""
    of_all = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    known = {target, ours(target)}
    return any(_matches(n, t, of) for t in known for n in {name, of_all})


def _check_experts(names: list[str], chosen: frozenset[str], of: str) -> None:
    """UserError where only some experts of a layer are chosen: they are one weight."""
    found: dict[str, dict[bool, str]] = {}
    for name in filter(is_expert, names):
        stack = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        found.setdefault(stack, {})[name in chosen] = name
    for stack in found.values():
        if len(stack) == 2:
            raise UserError(
                f"{of} targets '{stack[True]}' but not '{stack[False]}': all experts of a layer "
                "are one weight here; name them all, or none"
            )


def merge_lora(params: Tree) -> Tree:
    """Every adapter added into its base, in the base's dtype (summed in float32)."""

    def merge(w: Any) -> Any:
        return dense(w).astype(base_of(w).dtype) if isinstance(w, Lora) else w

    return _under_grids(merge, params)


def strip_lora(params: Tree) -> Tree:
    """The model without the adapters that train; shares every buffer."""

    def strip(w: Any) -> Any:
        return w.base if isinstance(w, Lora) and not w.frozen else w

    return _under_grids(strip, params)


def freeze_lora(params: Tree) -> Tree:
    """Marks the adapters of `params` as part of the model: only those added later train."""

    def freeze(w: Any) -> Any:
        return replace(w, frozen=True) if isinstance(w, Lora) else w

    return _under_grids(freeze, params)


def _under_grids(change: Callable[[Any], Any], params: Tree) -> Tree:
    """`change` of every leaf; of what is below it, where a leaf is a grid (`FakeQuant`)."""

    def one(w: Any) -> Any:
        return replace(w, base=one(w.base)) if isinstance(w, FakeQuant) else change(w)

    return jax.tree.map(one, params, is_leaf=is_weight)


def with_dropout(params: Tree, key: PRNGKeyArray | None) -> Tree:
    """Switches adapter dropout on for one step, a key for each weight and layer; None: off."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_weight)
    keyed = [_keyed(w, key, i) if isinstance(w, Lora) else w for i, w in enumerate(leaves)]
    return jax.tree.unflatten(treedef, keyed)


def _keyed(w: Lora, key: PRNGKeyArray | None, index: int) -> Lora:
    keys = None
    if key is not None and w.dropout > 0 and not w.frozen:
        keys = jax.random.split(jax.random.fold_in(key, index), w.a.shape[:-2])
    return replace(w, key=keys)


def _fresh(w: Any, rank: int, scale: float, key: PRNGKeyArray, dropout: float, dora: bool) -> Lora:
    *stack, out_dim, in_dim = base_of(w).shape
    bound = 1 / math.sqrt(in_dim)
    a = jax.random.uniform(key, (*stack, rank, in_dim), jnp.float32, -bound, bound)
    b = jnp.zeros((*stack, out_dim, rank), jnp.float32)
    magnitude = _row_norms(w) if dora else None
    return Lora(w, a, b, _full(stack, scale), magnitude, None, dropout)


@jax.jit
def _row_norms(w: Any) -> Array:
    # Compiled: step by step, float32 copies of the whole stack would be made.
    return jnp.linalg.norm(dense(w).astype(jnp.float32), axis=-1)


def _full(stack: list[int], scale: float) -> Array:
    return jnp.full(tuple(stack), scale, jnp.float32)


def _matches(name: str, target: str, of: str) -> bool:
    if name == target or name.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(f"{of} target '{target}' is no regular expression: {error}") from None
