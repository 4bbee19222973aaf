"""Adapters of experts in PEFT's files, in the two forms that PEFT 0.21 has.

    one by one    "...mlp.experts.7.gate_proj.lora_A.weight", as transformers 4 had them. At load
                  PEFT makes `target_parameters` of them, gate and up as one, and for that asks for
                  one rank and scale, and for both of the two
    wrapped       "...mlp.experts.base_layer.lora_A.weight" [E * r, in] and lora_B [out, r * E], of
                  a parameter that holds all experts (`target_parameters`); the last parameter of a
                  module is without "base_layer"

Wrapped are gpt-oss' when written, and all that PEFT 0.21 trained with transformers 5 when read.
Source: peft/tuners/lora/layer.py (ParamWrapper), peft/utils/transformers_weight_conversion.py.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# What transformers 5 stacks as one parameter.
_PARAMETERS = ("gate_up_proj", "down_proj")
_FUSED = (("gate_proj", "up_proj"), ("w1", "w3"))
FUSED_TARGET = "experts.gate_up_proj"  # gate and up as one, in `target_parameters`
_WRAPPED = re.compile(r"model\.layers\.(\d+)\.(\S+?)\.experts(\.base_layer)?")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")


@dataclass(frozen=True)
class Part:
    """One module's adapter, numpy float32: a [r, in], b [out, r], magnitude [out] or None.

    base: the module's own weight where the folder holds it (PEFT saves adapted embeddings so).
    """

    a: Any
    b: Any
    scale: float
    magnitude: Any = None
    base: Any = None


def split_name(name: str) -> tuple[str, int, str] | None:
    """("....experts", expert, module) of the name of one expert's module."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def uniform(parts: dict[str, Part]) -> dict[str, Part]:
    """The parts in one rank, the smaller filled up with zeros, and one scale."""
    if not parts:
        return {}
    rank = max(len(part.a) for part in parts.values())
    scale = next(iter(parts.values())).scale

    def one(part: Part) -> Part:
        more = rank - len(part.a)
        a, b = np.pad(part.a, ((0, more), (0, 0))), np.pad(part.b, ((0, 0), (0, more)))
        b = b if part.scale == scale else b * np.float32(part.scale / scale)
        return replace(part, a=a, b=b, scale=scale)

    return {name: one(part) for name, part in parts.items()}


def with_partners(parts: dict[str, Part], shapes: dict[str, tuple[int, int]]) -> dict[str, Part]:
    """The parts of experts, and zeros for a gate or up whose partner alone is adapted."""
    filled = dict(parts)
    for name, part in parts.items():
        stack, expert, module = split_name(name) or ("", 0, "")
        for pair in _FUSED:
            if module in pair:
                other = f"{stack}.{expert}.{pair[1 - pair.index(module)]}"
                zeros = replace(part, a=np.zeros_like(part.a), b=np.zeros_like(part.b))
                assert shapes[other] == shapes[name]
                filled.setdefault(other, zeros)
    return filled


def parameter_of(module: str) -> str:
    """What transformers 5 makes a part of of an expert's module."""
    return _PARAMETERS[0] if any(module in pair for pair in _FUSED) else _PARAMETERS[1]


def wrap(parts: list[Part]) -> tuple[Any, Any]:
    """(lora_A, lora_B) of one parameter from the parts of its experts, of one rank."""
    a = np.concatenate([part.a for part in parts])
    b = np.stack([part.b for part in parts], axis=-1)  # [out, r, E]
    return a, b.reshape(len(b), -1)


def unwrap(a: Any, b: Any, experts: int) -> list[tuple[Any, Any]]:
    """(a [r, in], b [out, r]) of each expert: the inverse of `wrap`."""
    lows = a.reshape(experts, -1, a.shape[-1])
    highs = b.reshape(len(b), -1, experts)
    return [(lows[e], np.ascontiguousarray(highs[..., e])) for e in range(experts)]


def is_wrapped(name: str) -> bool:
    """Whether a module of PEFT's stands for a parameter of all experts."""
    return _WRAPPED.fullmatch(name) is not None


def wrapped_parameter(name: str, names: Any, targets: list[str]) -> str | None:
    """Which parameter "....experts" or "....experts.base_layer" wraps; names: of all modules of the
    folder; None where `targets` (target_parameters) leave that open."""
    if name.endswith(".base_layer"):
        return _PARAMETERS[0]
    if f"{name}.base_layer" in names:
        return _PARAMETERS[1]
    own = {target.split(".")[-1] for target in targets} & set(_PARAMETERS)
    return own.pop() if len(own) == 1 else None


def modules_of(name: str, parameter: str, shapes: dict[str, Any]) -> list[list[str]]:
    """Our names of the modules of each expert that a wrapped parameter is: gate and up may be two.

    Empty for a layer that has no such experts. shapes: by the names of all modules.
    """
    found = _WRAPPED.fullmatch(name)
    assert found is not None
    start = f"model.layers.{found[1]}."
    stacks: dict[str, list[int]] = {}
    for other in shapes:
        if other.startswith(start) and (parts := split_name(other)):
            stacks.setdefault(f"{parts[0]}.{{}}.{parts[2]}", []).append(parts[1])
    names = {pattern.split(".")[-1]: pattern for pattern in stacks}
    choices = {
        "gate_up_proj": (("gate_up_proj",), *_FUSED),
        "down_proj": (("down_proj",), ("w2",)),
    }[parameter]
    for choice in choices:
        if all(module in names for module in choice):
            count = len(stacks[names[choice[0]]])
            return [[names[module].format(e) for module in choice] for e in range(count)]
    return []
