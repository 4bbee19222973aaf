"""Multi-head latent attention: keys and values of all heads from one narrow vector a token.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1. Keys and values are expanded before attention
(and before the cache), as they are for training; decoding in the latent space is not here.
"""

from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mud_puppy.model.arch import Arch
from mud_puppy.model.mlp import module, modules
from mud_puppy.model.norm import rms_norm
from mud_puppy.model.rope import rotate

Tree = Any

_EPS = 1e-6  # of the norms inside, whatever the config's


def latent_qkv(
    arch: Arch, p: Tree, x: Float[Array, "B T D"], cos: Array, sin: Array
) -> tuple[Float[Array, "B T H hd"], Float[Array, "B T H hd"], Float[Array, "B T H vd"]]:
    """q and k of nope + rotated numbers a head, v of `Latent.value`."""
    own, lead, H = arch.latent, x.shape[:-1], arch.heads
    assert own is not None
    name = "q_proj" if own.q_rank is None else "q_a_proj"
    q, kv = modules(x, [p[name], p["kv_a_proj_with_mqa"]])
    if own.q_rank is not None:
        q = module(p["q_b_proj"], rms_norm(q, p["q_a_layernorm"], _EPS))
    kv, k_rotated = jnp.split(kv, [own.kv_rank], axis=-1)
    kv = module(p["kv_b_proj"], rms_norm(kv, p["kv_a_layernorm"], _EPS))
    q, kv = checkpoint_name(q, "qkv"), checkpoint_name(kv, "qkv")
    q_own, q_rotated = jnp.split(q.reshape(*lead, H, -1), [own.nope], axis=-1)
    k_own, v = jnp.split(kv.reshape(*lead, H, -1), [own.nope], axis=-1)
    q_rotated = rotate(q_rotated, cos, sin, arch.interleaved)
    k_rotated = rotate(k_rotated[:, :, None], cos, sin, arch.interleaved)
    k_rotated = jnp.broadcast_to(k_rotated, (*lead, H, own.rotated))
    q = jnp.concatenate([q_own, q_rotated], axis=-1)
    return q, jnp.concatenate([k_own, k_rotated], axis=-1), v
