"""Attention over the mesh: each device runs the kernel on its own rows of the batch.

Kernels do not partition themselves, and XLA must not do it for them: on two H200 (jax 0.11.2) its
partitioning of cuDNN's backward pass gave gradients that were 10 % off, inside a scan, with no
error. Under `shard_map` the same call agrees with one device to bfloat16's rounding.

Segments that share a prefix see it by a second call, merged with the first by the log-sum-exps, as
the parts of one softmax are (arXiv:2402.05099, section 3.1).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import flash_attention
from mud_puppy.parallel import BATCH


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K vd"],
    segment_ids: Int[Array, "B T"] | None,
    prefix_ids: Int[Array, "B T"] | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H vd"]:
    """Causal `flash_attention` on the ambient mesh (`jax.set_mesh`); without one, directly.

    prefix_ids: of `Inputs`; a window is then to be no shorter than a row (`check_prefix`). A batch
    that the devices do not divide is computed whole on each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    call = partial(_flash, window, scale, softcap)
    if mesh.empty or mesh.size == 1:
        return call(q, k, v, segment_ids, prefix_ids, sinks)
    spec = PartitionSpec() if q.shape[0] % mesh.size else BATCH
    specs = (spec,) * 5 + (PartitionSpec(),)
    # check_vma: the kernels' custom_vjps do not say how their results vary over the mesh.
    sharded = jax.shard_map(call, in_specs=specs, out_specs=spec, check_vma=False)
    return sharded(q, k, v, segment_ids, prefix_ids, sinks)


def _flash(
    window: int | None,
    scale: float | None,
    softcap: float | None,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    prefix_ids: Array | None,
    sinks: Array | None,
) -> Array:
    shared = prefix_ids is not None
    options = {"scale": scale, "softcap": softcap, "return_lse": shared}
    own = flash_attention(q, k, v, window=window, segment_ids=segment_ids, sinks=sinks, **options)
    if not shared:
        return own
    # Causal hides nothing, as a prefix stands before what sees it; half of the blocks are left out
    # where their ids are not looked at (XLA). The ids of what has no part in it never meet.
    readers, read = jnp.maximum(-prefix_ids, 0), jnp.where(prefix_ids > 0, prefix_ids, -1)
    return _merged(
        own, flash_attention(q, k, v, segment_ids=readers, kv_segment_ids=read, **options)
    )


def _merged(own: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
    """The attention over the keys of both, from (out [B, T, H, vd], lse [B, T, H]) of each: every
    query has a key of its own, and a log-sum-exp of -inf weighs nothing."""
    (x, x_lse), (y, y_lse) = own, other
    share = jax.nn.sigmoid(y_lse - x_lse)[..., None]
    a, b = (part.astype(share.dtype) for part in (x, y))
    return (a + share * (b - a)).astype(x.dtype)
