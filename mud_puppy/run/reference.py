"""What a loss compares with: the policy as it was at step 0, or another model, a teacher."""

from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.config import DTYPES, Config
from mud_puppy.run.methods import method_of
from mud_puppy.run.teacher import Teacher
from mud_puppy.weights import combine, is_weight, partition, quantize, strip_lora

Tree = Any


def kept_of(config: Config, params: Tree) -> Tree | None:
    """What a run keeps of the params that it begins with, for `reference`.

    None where the loss has no reference, and for a fresh adapter, which adds nothing yet: its base
    is the reference, and takes no memory. Of a loaded adapter its own copy, beside the shared base.
    Where all weights train a copy in the type that the model computes in, or in codes.
    """
    if not method_of(config).reference or (config.adapts and config.adapter is None):
        return None
    # Copies: the step gives the buffers of what trains away.
    kept = jax.tree.map(jnp.copy, partition(params)[0])
    if config.adapts:
        return kept
    dtype = jnp.dtype(DTYPES[config.precision])
    kept = jax.tree.map(lambda x: x if is_weight(x) else x.astype(dtype), kept, is_leaf=is_weight)
    return kept if config.reference == "copy" else quantize(kept, config.reference)


def reference(kept: Tree | None, train: Tree, frozen: Tree) -> Tree:
    """The reference's params, from what was kept (`kept_of`) and the parts that train and do
    not. A teacher, which has a model of its own, is itself what was kept."""
    if isinstance(kept, Teacher):
        return kept
    if kept is None:
        return strip_lora(combine(train, frozen))
    return combine(kept, frozen) if jax.tree.leaves(frozen) else kept
