"""More words: an embedding, and an untied head, with rows for tokens that were added.

A new row is the mean of the old ones (https://nlp.stanford.edu/~johnhew/vocab-expansion.html): a
token that nobody has seen is then as likely as an average one, and not more than all others, as a
random row might make it. transformers adds noise of 1e-5 of the rows' spread to it; we do not.
"""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from mud_puppy.errors import UserError
from mud_puppy.model.families import rows
from mud_puppy.model.module import Model, build
from mud_puppy.weights import is_weight

Tree = Any


def resize_embeddings(
    model: Model, params: Tree, size: int, pad_to: int | None = None
) -> tuple[Model, Tree]:
    """(model, params) with room for `size` tokens, a multiple of `pad_to` rows.

    The old rows are as they were, the new ones their mean in float32, rounded to their dtype. Rows
    are never taken away: a tokenizer may well be smaller than its embedding, and a model that is
    large enough comes back as it is. params: arrays, sharded or not, or shapes (`abstract`).
    UserError for adapters or codes on the embedding or head.
    """
    if size < 1 or (pad_to is not None and pad_to < 1):
        raise UserError(f"size and pad_to must be at least 1, not {size} and {pad_to}")
    old, unit = model.arch.vocab_size, pad_to or 1
    new = -(-max(old, size) // unit) * unit
    if new == old:
        return model, params
    wide = [path for path, row in rows(model.arch).items() if row.axes[0] == "vocab"]
    for path in wide:
        if is_weight(params[path]):
            raise UserError(
                f"{path}: is a {type(params[path]).__name__}, which takes no new rows; resize the "
                "embeddings before adapters are added or weights are quantized"
            )
    fields = json.loads(model.arch.config)
    arch = model.arch.replace(vocab_size=new, config=json.dumps(_with(fields, new), sort_keys=True))
    resized = replace(build(arch, model.source)[0], dtype=model.dtype, tile=model.tile)
    return resized, params | {path: _grown(params[path], new) for path in wide}


def _with(fields: dict[str, Any], size: int) -> dict[str, Any]:
    """The fields of a config.json, with this vocabulary."""
    inner = {
        name: _with(value, size)
        for name, value in fields.items()
        if isinstance(value, dict) and "vocab_size" in value
    }
    return fields | inner | {"vocab_size": size}


def _grown(w: Any, size: int) -> Any:
    """w [V, ...] with `size` rows, where w is: an array on its devices, or a shape."""
    shape, place = (size, *w.shape[1:]), w.sharding
    if isinstance(w, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, w.dtype, sharding=place)
    if not isinstance(place, NamedSharding):
        return _appended(w, size)
    return jax.jit(_appended, static_argnums=1, out_shardings=place)(w, size)


@partial(jax.jit, static_argnums=1)
def _appended(w: Array, size: int) -> Array:
    mean = w.astype(jnp.float32).mean(axis=0, keepdims=True).astype(w.dtype)
    return jnp.concatenate([w, jnp.broadcast_to(mean, (size - w.shape[0], *w.shape[1:]))])
