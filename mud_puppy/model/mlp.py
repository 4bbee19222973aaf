"""The part of a block after its attention: a gated MLP, a plain one, or a mixture of experts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mud_puppy.model.arch import Arch
from mud_puppy.weights import linear, linears

Tree = Any

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def mlp(arch: Arch, p: Tree, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """p has gate_proj and up_proj, or gate_up_proj, or up_proj alone; and down_proj."""
    if "gate_up_proj" in p:
        gate, up = jnp.split(named("gate_up", p["gate_up_proj"], x), 2, axis=-1)
        inner = gated(arch, gate, up)
    elif "gate_proj" in p:
        pair = modules(x, [p["gate_proj"], p["up_proj"]])
        inner = gated(arch, *(checkpoint_name(y, "gate_up") for y in pair))
    else:
        inner = ACTIVATIONS[arch.act](named("gate_up", p["up_proj"], x))
    return module(p["down_proj"], inner)


def gated(arch: Arch, gate: Array, up: Array) -> Array:
    """act(gate) * up; with `act_limit` as gpt-oss has it: both clipped, up + 1, a sharper sigmoid.

    Source: https://github.com/openai/gpt-oss, gpt_oss/torch/model.py (swiglu).
    """
    if arch.act_limit is None:
        return ACTIVATIONS[arch.act](gate) * up
    limit = arch.act_limit
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def module(m: Tree, x: Array) -> Array:
    """x @ weight.T + bias of a linear module."""
    y = linear(x, m["weight"])
    return y + m["bias"].astype(y.dtype) if "bias" in m else y


def named(name: str, m: Tree, x: Array) -> Array:
    """`module` whose result the backward pass may keep, by that name."""
    return checkpoint_name(module(m, x), name)


def modules(x: Array, ms: list[Tree]) -> list[Array]:
    """`module` of several that read the same x."""
    ys = linears(x, [m["weight"] for m in ms])
    return [
        y + m["bias"].astype(y.dtype) if "bias" in m else y for y, m in zip(ys, ms, strict=True)
    ]
