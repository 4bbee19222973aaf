"""From a language model to one that scores: reward models, process reward models, classifiers.

The decoder and its weights stay, whatever they are (adapters, codes); the head of words goes, and a
fresh head of `labels` scores comes. What `save_hf` then writes is transformers'
XForSequenceClassification or XForTokenClassification (`families.heads`).
"""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PRNGKeyArray

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch
from mud_puppy.model.families import head_of, rows, with_head
from mud_puppy.model.module import Model, build
from mud_puppy.parallel import weight_sharding

Tree = Any


def with_score_head(
    model: Model,
    params: Tree,
    labels: int = 1,
    task: str = "sequence",
    *,
    key: PRNGKeyArray,
    pad_token_id: int | None = None,
) -> tuple[Model, Tree]:
    """(model, params) with a fresh head of scores in the place of the head of words.

    task: "sequence" (a score of the whole, at its last token: reward models have labels=1) or
    "token". The weight float32 [labels, D] is normal of the config's initializer_range, the bias,
    which token classifiers have, zero: so transformers makes them. params: arrays, sharded or not,
    or shapes (`abstract`); all other leaves are the same objects.

    pad_token_id: transformers scores a sequence at its last token that is not this one, so it must
    be what the tokenizer pads with, and no answer may end with it. None: the config's own, or its
    first end-of-sequence token. UserError for a family that transformers has no such class for, and
    for a model that has a head of scores.
    """
    if model.arch.task != "lm":
        raise UserError(
            f"this model has a head already: {model.arch.labels} scores of each {model.arch.task}"
        )
    arch = with_head(model.arch, task, labels)
    arch = arch.replace(config=json.dumps(_fields(arch, pad_token_id), sort_keys=True))
    scored = replace(build(arch, model.source)[0], dtype=model.dtype, tile=model.tile)
    kept = {name: child for name, child in params.items() if name != "head"}
    return scored, kept | {"score": _fresh(arch, params["final_norm"], key)}


def _fields(arch: Arch, pad: int | None) -> dict[str, Any]:
    """The fields of config.json. transformers counts the labels, and writes no num_labels."""
    fields = json.loads(arch.config)
    names = [f"LABEL_{i}" for i in range(arch.labels)]
    return fields | {
        "architectures": [head_of(arch.family, arch.task).hf_class],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        # What transformers takes one label for; servers would put a sigmoid on it otherwise.
        "problem_type": "regression" if (arch.task, arch.labels) == ("sequence", 1) else None,
        "pad_token_id": _pad(fields) if pad is None else pad,
    }


def _pad(fields: dict[str, Any]) -> int | None:
    own, ends = fields.get("pad_token_id"), fields.get("eos_token_id")
    if own is not None and own >= 0:
        return own
    return ends[0] if isinstance(ends, list) else ends


def _fresh(arch: Arch, like: Any, key: PRNGKeyArray) -> dict[str, Any]:
    """The head, on the devices of `like`, one of the params; shapes where that is one."""
    made = {}
    for path, row in rows(arch).items():
        top, _, name = path.partition("/")
        if top != "score":
            continue
        shape = tuple(arch.sizes[axis] for axis in row.axes)
        made[name] = _placed(_values(name, shape, arch.init_std, key, like), row.axes, like)
    return made


def _values(name: str, shape: tuple[int, ...], std: float, key: PRNGKeyArray, like: Any) -> Any:
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    if name == "bias":
        return jnp.zeros(shape, jnp.float32)
    return jax.random.normal(key, shape, jnp.float32) * std


def _placed(x: Any, axes: tuple[str, ...], like: Any) -> Any:
    if isinstance(like, jax.ShapeDtypeStruct | Tracer) or not isinstance(
        like.sharding, NamedSharding
    ):
        return x
    mesh = like.sharding.mesh
    assert isinstance(mesh, Mesh)  # an array's, on devices
    return jax.device_put(x, weight_sharding(mesh, axes, x.shape))
