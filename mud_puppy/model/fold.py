"""The linears of a block in the order in which they run, and scales of a linear's inputs moved into
what makes them, so that the block computes the same.

q, k, v     read the attention norm's output: its weight is divided
gate, up    read the MLP norm's
o           reads averages of v's outputs: v's rows are divided; the query heads that share a
            key/value head share its scales
down        reads act(gate) * up: up's rows are divided
q_b, kv_b   of latent attention read the norms of what q_a and kv_a make

Not divided is what others read too (the norm before a router, or before both parts of a parallel
block), what is no plain product (an act without a gate, clipped gates), and a fused projection.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.model.arch import Arch
from mud_puppy.weights.tree import Path, at_path, with_path

Tree = Any

_VALUES = ("self_attn", "v_proj")


@dataclass(frozen=True)
class Stage:
    """Linears of a block, by name within `part`, that read the same inputs; `source` makes these: a
    norm of the block, or a linear; None where no scale can be moved."""

    part: Path
    names: tuple[str, ...]
    source: Path | None

    @property
    def experts(self) -> bool:
        return self.part[-1] == "experts"

    @property
    def paths(self) -> list[Path]:
        return [(*self.part, name) for name in self.names]


def stages(arch: Arch, block: Tree) -> list[Stage]:
    """Of a `canonical` block, in the order in which it runs them."""
    both = arch.parallel and "mlp_norm" not in block
    before = ("attn_norm",) if "attn_norm" in block and not both else None
    after = ("mlp_norm",) if "mlp_norm" in block else None
    found, inner = _attention(arch, block["self_attn"], before), block["mlp"]
    if "router" not in inner:
        return found + _glu(arch, ("mlp",), inner, after)
    found += _glu(arch, ("mlp", "experts"), inner["experts"], None)
    if "shared" in inner:
        found += _glu(arch, ("mlp", "shared"), inner["shared"], None)
    return found


def _attention(arch: Arch, p: Tree, norm: Path | None) -> list[Stage]:
    part = ("self_attn",)
    if arch.latent is not None:
        queries = "q_proj" if arch.latent.q_rank is None else "q_a_proj"
        found = [Stage(part, (queries, "kv_a_proj_with_mqa"), norm)]
        if arch.latent.q_rank is not None:
            found.append(Stage(part, ("q_b_proj",), (*part, "q_a_layernorm")))
        found.append(Stage(part, ("kv_b_proj",), (*part, "kv_a_layernorm")))
        return [*found, Stage(part, ("o_proj",), None)]
    if "qkv_proj" in p:
        return [Stage(part, ("qkv_proj",), norm), Stage(part, ("o_proj",), None)]
    names = ("q_proj", "k_proj", "v_proj")
    return [Stage(part, names, norm), Stage(part, ("o_proj",), _VALUES)]


def _glu(arch: Arch, part: Path, p: Tree, norm: Path | None) -> list[Stage]:
    if "gate_proj" not in p:
        first = "gate_up_proj" if "gate_up_proj" in p else "up_proj"
        return [Stage(part, (first,), norm), Stage(part, ("down_proj",), None)]
    up = (*part, "up_proj") if arch.act_limit is None else None
    return [Stage(part, ("gate_proj", "up_proj"), norm), Stage(part, ("down_proj",), up)]


def fold(arch: Arch, block: Tree, stage: Stage, s: Float[Array, "*E m"]) -> Tree:
    """The canonical block (float leaves, not stacked) with weights of `stage` multiplied by s,
    float32, and their source divided by it; s has the size of `shared`, of experts one each."""
    assert stage.source is not None
    for path in stage.paths:
        module = at_path(block, path)
        wide = _wide(module["weight"]) * spread(arch, stage, s)[..., None, :]
        block = with_path(block, path, {**module, "weight": wide})
    source = at_path(block, stage.source)
    if isinstance(source, dict):
        rows = {"weight": s[..., :, None], "bias": s}
        divided = {name: _wide(x) / rows[name] for name, x in source.items()}
        return with_path(block, stage.source, divided)
    # The norms of a block may multiply by their weight and one.
    *above, name = stage.source
    one = 0.0 if above else arch.norm_offset
    block = with_path(block, stage.source, (_wide(source) + one) / s - one)
    bias = f"{name}_bias"
    return {**block, bias: _wide(block[bias]) / s} if bias in block else block


def shared(arch: Arch, stage: Stage, x: Float[Array, " n"]) -> Float[Array, " m"]:
    """A number for each input, averaged over the inputs that one output of the source makes."""
    if stage.source != _VALUES:
        return x
    return x.reshape(arch.kv_heads, -1, arch.head_dim).mean(1).reshape(-1)


def spread(arch: Arch, stage: Stage, s: Float[Array, "*B m"]) -> Float[Array, "*B n"]:
    """A number for each output of the source, for all the inputs that it makes."""
    if stage.source != _VALUES:
        return s
    lead, repeats = s.shape[:-1], arch.heads // arch.kv_heads
    heads = s.reshape(*lead, arch.kv_heads, 1, arch.head_dim)
    return jnp.repeat(heads, repeats, axis=-2).reshape(*lead, -1)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
