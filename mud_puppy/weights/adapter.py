"""Adapters between a params tree and a PEFT folder, both ways."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.weights.leaf import Lora, base_of, is_weight
from mud_puppy.weights.peft import read_adapter
from mud_puppy.weights.peft_experts import Part
from mud_puppy.weights.peft_write import write_adapter
from mud_puppy.weights.tree import Tree, is_expert, map_modules, under_rounding


def load_adapter(params: Tree, folder: str | Path) -> Tree:
    """Puts a PEFT adapter on its modules, above the adapters that they have.

    Layers of one stacked weight may differ in rank (the smaller are padded with zeros, which stay
    zero in training) and in scale. A head of scores that was trained beside them replaces that of
    `params`. Every tensor of the folder is used, or it is a UserError.
    """
    folder = Path(folder).expanduser()
    shapes: dict[str, tuple[int, int]] = {}
    map_modules(lambda names, w: shapes.update(_shapes(names, w)), lambda name: None, params)
    adapter = read_adapter(folder, shapes)
    parts = adapter.parts

    def adapt(names: list[str], w: Any) -> Any:
        if not any(name in parts for name in names):
            return w
        if missing := [name for name in names if name not in parts]:
            raise UserError(
                f"{folder}: adapts only some experts of a layer, not '{missing[0]}'; all experts "
                "of a layer are one weight here"
            )
        _check_base(folder, names[0], parts[names[0]], w)
        return _lora(w, [parts[name] for name in names], adapter.dropout)

    return map_modules(adapt, parts.__contains__, _with_score(folder, params, adapter.score))


def save_adapter(model: Any, params: Tree, out: str | Path) -> None:
    """Writes the adapters of `params` as one PEFT folder; `model` says what PEFT calls the modules
    (`Model.peft_names`) and names the base in its config.

    Adapters stacked on one weight become one with their ranks in a row; a head of scores goes along
    (PEFT's `modules_to_save`). UserError when there are no adapters, and as `check_savable` says.
    """
    params = jax.tree.map(under_rounding, params, is_leaf=is_weight)
    check_savable(params)
    parts: dict[str, Part] = {}
    map_modules(lambda names, w: parts.update(_parts(names, w)), lambda name: None, params)
    if not parts:
        raise UserError("there is no adapter to save: no weight of these params has one")
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    dropouts = {w.dropout for w in leaves if isinstance(w, Lora)}
    shapes: dict[str, tuple[int, int]] = {}
    map_modules(lambda names, w: shapes.update(_shapes(names, w)), lambda name: None, params)
    write_adapter(
        Path(out).expanduser(),
        parts,
        shapes,
        model.peft_names,
        max(dropouts),
        model.source or "",
        {kind: np.asarray(x, np.float32) for kind, x in params.get("score", {}).items()},
    )


def check_savable(params: Tree) -> None:
    """UserError when no single PEFT folder can hold the adapters of `params`.

    That is when one of a stack is DoRA (its norm is of the sum), or some modules have one and
    others a plain adapter (PEFT would give those magnitudes of its own).
    """
    chains: dict[str, list[Lora]] = {}
    map_modules(lambda names, w: chains.update({names[0]: _chain(w)}), lambda name: None, params)
    kinds: dict[bool, str] = {}
    experts = {name.split(".")[-1] for name in chains if is_expert(name)}
    for name, chain in chains.items():
        dora = any(lora.magnitude is not None for lora in chain)
        if dora and name.split(".")[-1] in experts:
            raise UserError(
                f"'{name}' has a DoRA, and PEFT takes its name for one of the experts', for which "
                "it has none: leave it out of the targets"
            )
        if dora and len(chain) > 1:
            raise UserError(
                f"'{name}' has a DoRA in a stack of adapters, which no single adapter equals: "
                "merge the lower one into the base first"
            )
        if chain:
            kinds[dora] = name
    if len(kinds) > 1:
        raise UserError(
            f"'{kinds[True]}' has a DoRA adapter and '{kinds[False]}' a plain one, which no single "
            "adapter can say: merge the older one into the base first"
        )


def _with_score(folder: Path, params: Tree, score: dict[str, np.ndarray]) -> Tree:
    """`params` with the head of scores that an adapter brings, where it brings one."""
    if not score:
        return params
    given = {kind: x.shape for kind, x in score.items()}
    have = {kind: x.shape for kind, x in params.get("score", {}).items()}
    if not have:
        raise UserError(
            f"{folder}: holds a head of scores {given}, which this language model has not: give it "
            "one first (with_score_head)"
        )
    if given != have:
        raise UserError(f"{folder}: holds a head of scores {given}, but the model's is {have}")
    return {**params, "score": {kind: jnp.asarray(x, jnp.float32) for kind, x in score.items()}}


def _shapes(names: list[str], w: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    for name in names:
        yield name, base_of(w).shape[-2:]


def _check_base(folder: Path, name: str, part: Part, w: Any) -> None:
    if part.base is None:
        return
    if isinstance(base_of(w), Quantized):
        raise UserError(
            f"{folder}: holds weights of '{name}' itself, which is in codes here and cannot be "
            "compared: load the adapter on the model with that weight in floats"
        )
    given, ours = part.base, np.asarray(base_of(w))
    # Either may have been rounded to 16 bits on its way.
    narrow = min(given.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    if not np.array_equal(given.astype(narrow), ours.astype(narrow)):
        raise UserError(
            f"{folder}: holds weights of '{name}' itself that differ from this model's; adapters "
            "with a trained or resized embedding do not load"
        )


def _lora(w: Any, parts: list[Part], dropout: float) -> Lora:
    """One leaf from the parts of its layers, or from the one part of an unstacked weight."""
    lead = base_of(w).shape[:-2]  # layers, and experts
    rank = max(len(part.a) for part in parts)

    def leaf(values: list[Any]) -> Any:
        return jnp.asarray(np.stack(values).reshape((*lead, *values[0].shape)), jnp.float32)

    return Lora(
        base=w,
        a=leaf([np.pad(part.a, ((0, rank - len(part.a)), (0, 0))) for part in parts]),
        b=leaf([np.pad(part.b, ((0, 0), (0, rank - len(part.a)))) for part in parts]),
        scale=leaf([np.float32(part.scale) for part in parts]),
        magnitude=None if parts[0].magnitude is None else leaf([p.magnitude for p in parts]),
        dropout=dropout,
    )


def _parts(names: list[str], w: Any) -> Iterator[tuple[str, Part]]:
    if not isinstance(w, Lora):
        return
    # The whole stack comes from the device at once: there may be thousands of experts.
    chain = [jax.tree.map(np.asarray, replace(lora, base=None, key=None)) for lora in _chain(w)]
    for name, at in zip(names, np.ndindex(base_of(w).shape[:-2]), strict=True):
        yield name, _joined([_at(lora, at) for lora in chain])


def _chain(w: Any) -> list[Lora]:
    """The adapters on a weight, innermost first."""
    return [*_chain(w.base), w] if isinstance(w, Lora) else []


def _at(w: Lora, at: Any) -> Part:
    magnitude = None if w.magnitude is None else w.magnitude[at]
    part = Part(w.a[at], w.b[at], float(w.scale[at]), magnitude)
    # Ranks that are zero on both sides are the padding of `_lora`.
    used = np.flatnonzero(part.a.any(axis=1) | part.b.any(axis=0))
    rank = int(used[-1]) + 1 if len(used) else part.a.shape[0]
    return Part(part.a[:rank], part.b[:, :rank], part.scale, magnitude)


def _joined(parts: list[Part]) -> Part:
    """sum of scale * b @ a, as one: ranks in a row, scales folded into b."""
    if len(parts) == 1:
        return parts[0]
    a = np.concatenate([part.a for part in parts])
    b = np.concatenate([np.float32(part.scale) * part.b for part in parts], axis=1)
    return Part(a, b, 1.0)
