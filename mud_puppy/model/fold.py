"""Scales of a linear's inputs moved into what makes them, so that the block computes the same.

q, k, v     read the attention norm's output: its weight is divided
gate, up    read the MLP norm's
o           reads averages of v's outputs: v's rows are divided; the query heads that share a
            key/value head share its scales
down        reads act(gate) * up: up's rows are divided
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.model.arch import Arch

Tree = Any


@dataclass(frozen=True)
class Stage:
    """Linears of a block, by name within `part`, that read the same inputs; `source` makes these:
    a norm of the block, or a linear of the same part."""

    part: str
    names: tuple[str, ...]
    source: str


# In the order in which a block runs them.
STAGES = (
    Stage("self_attn", ("q_proj", "k_proj", "v_proj"), "attn_norm"),
    Stage("self_attn", ("o_proj",), "v_proj"),
    Stage("mlp", ("gate_proj", "up_proj"), "mlp_norm"),
    Stage("mlp", ("down_proj",), "up_proj"),
)


def fold(arch: Arch, block: Tree, stage: Stage, s: Float[Array, " m"]) -> Tree:
    """The block (float leaves, not stacked) with weights of `stage` multiplied by s, float32, and
    their source divided by it; s has the size of `shared`."""
    block = {**block, stage.part: dict(block[stage.part])}
    part = block[stage.part]
    for name in stage.names:
        part[name] = {**part[name], "weight": _wide(part[name]["weight"]) * spread(arch, stage, s)}
    if stage.source in block:
        block[stage.source] = _wide(block[stage.source]) / s
        return block
    rows = {"weight": s[:, None], "bias": s}
    source = part[stage.source]
    part[stage.source] = {name: _wide(x) / rows[name] for name, x in source.items()}
    return block


def shared(arch: Arch, stage: Stage, x: Float[Array, " n"]) -> Float[Array, " m"]:
    """A number for each input, averaged over the inputs that one output of the source makes."""
    if stage.source != "v_proj":
        return x
    return x.reshape(arch.kv_heads, -1, arch.head_dim).mean(1).reshape(-1)


def spread(arch: Arch, stage: Stage, s: Float[Array, "*B m"]) -> Float[Array, "*B n"]:
    """A number for each output of the source, for all the inputs that it makes."""
    if stage.source != "v_proj":
        return s
    lead, repeats = s.shape[:-1], arch.heads // arch.kv_heads
    heads = s.reshape(*lead, arch.kv_heads, 1, arch.head_dim)
    return jnp.repeat(heads, repeats, axis=-2).reshape(*lead, -1)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
