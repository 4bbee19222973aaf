"""Attention over the mesh: each device runs the kernel on its own rows of the batch.

Kernels do not partition themselves, and XLA must not do it for them: on two H200 (jax 0.11.2) its
partitioning of cuDNN's backward pass gave gradients that were 10 % off, inside a scan, with no
error. Under `shard_map` the same call agrees with one device to bfloat16's rounding.
"""

from functools import partial

import jax
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
    return flash_attention(
        q,
        k,
        v,
        window=window,
        segment_ids=segment_ids,
        prefix_ids=prefix_ids,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
