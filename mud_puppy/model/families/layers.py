"""What a config says of each layer: its window, its rotary embedding, whether it has experts."""

from dataclasses import replace
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Layer, Rope
from mud_puppy.model.rope import read_rope

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_layers(config: Any, rotated: int) -> tuple[tuple[Rope, ...], tuple[Layer, ...]]:
    """(kinds of rotary embedding, layers). `layer_types` says which layers slide; without it all do
    where the config has a `sliding_window`. rotated: numbers of a head that may be rotated."""
    fields, count = config.to_dict(), config.num_hidden_layers
    types = fields.get("layer_types")
    if types is None:
        types = [_FULL if fields.get("sliding_window") is None else _SLIDING] * count
    if unknown := set(types) - {_SLIDING, _FULL}:
        raise UserError(f"config: layer_types {sorted(unknown)} are not supported")
    if len(types) != count:
        raise UserError(f"config: layer_types says {len(types)} layers, num_hidden_layers {count}")
    windows = {_FULL: None, _SLIDING: _window(fields) if _SLIDING in types else None}
    ropes, of = _ropes(fields.get("rope_parameters"), sorted(set(types)), rotated, config)
    return ropes, tuple(Layer(windows[kind], of[kind]) for kind in types)


def _window(fields: dict[str, Any]) -> int:
    window = fields.get("sliding_window")
    if window is None or window < 1:
        raise UserError(f"config: sliding_window must be at least 1, not {window}")
    return window


def _ropes(
    spec: Any, types: list[str], rotated: int, config: Any
) -> tuple[tuple[Rope, ...], dict[str, int | None]]:
    """The kinds that there are, and which one each type of layer has."""
    if spec is None:
        return (), dict.fromkeys(types)
    limit = config.max_position_embeddings
    if not any(kind in spec for kind in (_SLIDING, _FULL)):
        return (read_rope(spec, rotated, limit),), dict.fromkeys(types, 0)
    ropes: list[Rope] = []
    of: dict[str, int | None] = {}
    for kind in types:
        own = spec.get(kind)
        rope = None if own is None else read_rope(own, rotated, limit)
        if rope is not None and rope not in ropes:
            ropes.append(rope)
        of[kind] = None if rope is None else ropes.index(rope)
    return tuple(ropes), of


def without_rope(layers: tuple[Layer, ...], bare: list[bool]) -> tuple[Layer, ...]:
    """The layers, those that are bare without a rotary embedding (NoPE)."""
    return tuple(replace(k, rope=None) if b else k for k, b in zip(layers, bare, strict=True))


def with_experts(layers: tuple[Layer, ...], sparse: list[bool]) -> tuple[Layer, ...]:
    """The layers, with experts where `sparse`."""
    return tuple(replace(k, sparse=s) for k, s in zip(layers, sparse, strict=True))
