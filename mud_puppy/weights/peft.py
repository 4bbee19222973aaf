"""PEFT's adapter folder, adapter_config.json and adapter_model.safetensors, as numpy parts.

The tensors' names say which modules are adapted; the config gives ranks, scales and dropout.
Options of PEFT that change the forward pass and are not here are refused by name.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import logging
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError, nearest_file
from mud_puppy.weights.peft_experts import (
    FUSED_TARGET,
    Part,
    is_wrapped,
    modules_of,
    parameter_of,
    split_name,
    uniform,
    unwrap,
    with_partners,
    wrap,
    wrapped_parameter,
)
from mud_puppy.weights.peft_names import EMBEDDING, PeftNames, ours

__all__ = ["Part", "read_adapter", "write_adapter"]

log = logging.getLogger("mud_puppy")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
# PEFT's names of a and b; an embedding's are transposed, its weight being [V, D] = [in, out].
_LINEAR_KINDS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_KINDS = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_BASE_KINDS = ("base_layer.weight", "weight")


def read_adapter(folder: Path, shapes: dict[str, tuple[int, int]]) -> tuple[dict[str, Part], float]:
    """(parts by our names of modules, dropout). `shapes`: [out, in] of every module there is.

    UserError for a module that is not in `shapes`, a tensor of another shape, or one left over.
    """
    config = _read_config(folder)
    modules = _by_module(_read_tensors(folder), folder)
    parts = {}
    for theirs, tensors in modules.items():
        name = ours(theirs)
        if is_wrapped(name):
            parts |= _experts(config, folder, theirs, tensors, modules, shapes)
            continue
        if name not in shapes:
            raise _unknown(config, folder, name, theirs)
        parts[name] = _part(config, folder, theirs, tensors, shapes[name])
    if not parts:
        raise UserError(f"{folder / TENSORS}: holds no tensors; save the adapter again")
    # Experts' partners that are there because PEFT asks for them (`with_partners`).
    parts = {n: p for n, p in parts.items() if split_name(n) is None or p.a.any() or p.b.any()}
    return parts, float(config.get("lora_dropout") or 0.0)


def _unknown(config: dict[str, Any], folder: Path, name: str, theirs: str) -> UserError:
    why = " (its head is tied to the embedding)" if name == "lm_head" else ""
    if name.endswith((".gate", ".router")):
        why = " as a linear: adapters of routers do not load"
    base = config.get("base_model_name_or_path") or "another model"
    return UserError(
        f"{folder}: adapts module '{theirs}', which this model has not{why}; the adapter was made "
        f"for {base}"
    )


# Fields that do not change what a trained adapter computes, and those that `_part` reads.
_KNOWN = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying exclude_modules "
    "inference_mode layers_pattern layers_to_transform loftq_config megatron_config "
    "megatron_core peft_type peft_version qalora_group_size revision runtime_config "
    "target_modules target_parameters fan_in_fan_out task_type r lora_alpha lora_dropout "
    "rank_pattern alpha_pattern use_rslora use_dora".split()
)
# Ways of starting an adapter that leave the base weights alone (PiSSA, OLoRA, ... do not).
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such adapter folder (one of the hub is downloaded first)."
            f"{nearest_file(folder)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {CONFIG} here, so it is no PEFT adapter folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA; only LoRA adapters load")
    if config.pop("init_lora_weights", True) not in _PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights changed the base weights; save the adapter from PEFT with "
            "path_initial_model_for_weight_conversion first"
        )
    if config.pop("bias", "none") != "none":
        raise UserError(f"{path}: bias is not 'none'; adapters with trained biases do not load")
    for key, value in config.items():
        if key not in _KNOWN and value:
            raise UserError(f"{path}: {key}={value!r} is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, key, config.get(key) or {})
    if not isinstance(config.get("lora_dropout") or 0.0, int | float):
        raise UserError(f"{path}: lora_dropout must be a number, not {config['lora_dropout']!r}")
    return config


def _check_pattern(path: Path, key: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {key} must be an object, not {pattern!r}")
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise UserError(f"{path}: {key}: '{name}' is no regular expression: {error}") from None


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / TENSORS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        hint = " (adapter_model.bin is a pickle, and pickles are never opened)" if pickled else ""
        raise UserError(f"{folder}: no {TENSORS} here{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from None


def _by_module(tensors: dict[str, np.ndarray], folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"model.layers.0.self_attn.q_proj": {"lora_A.weight": ...}}"""
    kinds = (*_LINEAR_KINDS, *_EMBEDDING_KINDS, _MAGNITUDE, *_BASE_KINDS)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix(_PREFIX)
        kind = next((kind for kind in kinds if path.endswith("." + kind)), None)
        if kind is None or path == name:
            raise UserError(f"{folder}: tensor '{name}' {tensor.shape} is no part of a LoRA")
        modules.setdefault(path.removesuffix("." + kind), {})[kind] = tensor
    return modules


def _part(
    config: dict[str, Any],
    folder: Path,
    name: str,
    tensors: dict[str, np.ndarray],
    shape: tuple[int, int],
) -> Part:
    # A parameter is looked up by its own name.
    parameter = any(f"{name}.weight".endswith(t) for t in config.get("target_parameters") or [])
    rank, alpha = _rank_and_alpha(config, folder, f"{name}.weight" if parameter else name)
    embedding, dora = ours(name) == EMBEDDING, bool(config.get("use_dora"))
    if dora and embedding:
        raise UserError(f"{folder}: DoRA on the embedding is not supported")
    kinds = _EMBEDDING_KINDS if embedding else _LINEAR_KINDS
    out_dim, in_dim = shape[::-1] if embedding else shape
    expected = {kinds[0]: (rank, in_dim), kinds[1]: (out_dim, rank)}
    expected |= {_MAGNITUDE: (out_dim,)} if dora else {}
    for kind, size in expected.items():
        found = tensors[kind].shape if kind in tensors else "missing"
        if found != size:
            raise UserError(
                f"{folder}: tensor '{_PREFIX}{name}.{kind}' is {found}; "
                f"the adapter's config and the base model say {size}"
            )
    if extra := set(tensors) - set(expected) - set(_BASE_KINDS):
        raise UserError(f"{folder}: tensor '{_PREFIX}{name}.{min(extra)}' has no use here")
    a, b, *magnitude = (tensors[kind].astype(np.float32) for kind in expected)
    a, b = (b.T, a.T) if embedding else (a, b)
    base = next((tensors[kind] for kind in _BASE_KINDS if kind in tensors), None)
    return Part(a, b, _scale(config, rank, alpha), magnitude[0] if magnitude else None, base)


def _experts(
    config: dict[str, Any],
    folder: Path,
    name: str,
    tensors: dict[str, np.ndarray],
    modules: dict[str, Any],
    shapes: dict[str, tuple[int, int]],
) -> dict[str, Part]:
    """The parts of each expert from the adapter of a parameter that holds all of them."""
    parameter = wrapped_parameter(name, modules, list(config.get("target_parameters") or []))
    if parameter is None:
        raise UserError(
            f"{folder / CONFIG}: target_parameters do not say which parameter '{name}' adapts"
        )
    experts = modules_of(ours(name), parameter, shapes)
    if not experts:
        raise _unknown(config, folder, ours(name), name)
    own = f"{name.removesuffix('.base_layer')}.{parameter}"
    rank, alpha = _rank_and_alpha(config, folder, own)
    sizes = [shapes[module] for module in experts[0]]
    rows, inputs = sum(out for out, _ in sizes), sizes[0][1]
    total = rank * len(experts)
    for kind, size in zip(_LINEAR_KINDS, ((total, inputs), (rows, total)), strict=True):
        found = tensors[kind].shape if kind in tensors else "missing"
        if found != size:
            raise UserError(
                f"{folder}: tensor '{_PREFIX}{name}.{kind}' is {found}; the adapter's config and "
                f"the base model say {size}"
            )
    pair = (tensors[kind].astype(np.float32) for kind in _LINEAR_KINDS)
    scale, ends = _scale(config, rank, alpha), np.cumsum([out for out, _ in sizes])[:-1]
    return {
        module: Part(a, own_b, scale)
        for names, (a, b) in zip(experts, unwrap(*pair, len(experts)), strict=True)
        for module, own_b in zip(names, np.split(b, ends), strict=True)
    }


def _rank_and_alpha(config: dict[str, Any], folder: Path, name: str) -> tuple[int, int | float]:
    rank = _lookup(config.get("rank_pattern"), name, config.get("r"))
    alpha = _lookup(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(
            f"{folder / CONFIG}: r and lora_alpha must be numbers, not {rank!r} and {alpha!r}"
        )
    return rank, alpha


def _scale(config: dict[str, Any], rank: int, alpha: int | float) -> float:
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _lookup(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name`, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def write_adapter(
    out: Path,
    parts: dict[str, Part],
    shapes: dict[str, tuple[int, int]],
    names: PeftNames,
    dropout: float,
    base_model: str,
) -> None:
    """Writes a folder that PEFT loads; parts and shapes ([out, in] of every module of the model) by
    our names."""
    parts = {names.theirs(name): part for name, part in parts.items()}
    shapes = {names.theirs(name): shape for name, shape in shapes.items()}
    found = _plain(parts, shapes, names) + _experts_found(parts, shapes, names)
    # A module's rank and scale go by its own name, but those of experts that PEFT has still to make
    # parameters of go by the adapter's.
    first = next((own for own in found if own.of_all), None)
    config = _config(found, first) | {"base_model_name_or_path": base_model}
    config["lora_dropout"] = dropout
    if dropout and (config["target_parameters"] or first):
        log.warning("%s: lora_dropout %s is written as 0: PEFT has none for experts", out, dropout)
        config["lora_dropout"] = 0.0
    config["fan_in_fan_out"] = names.conv1d
    tensors = {f"{_PREFIX}{name}": x for own in found for name, x in own.tensors.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / f"{TENSORS}.tmp", metadata={"format": "pt"})
        (out / f"{CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # The config makes it an adapter folder, so it comes last.
        os.replace(out / f"{TENSORS}.tmp", out / TENSORS)
        os.replace(out / f"{CONFIG}.tmp", out / CONFIG)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: the adapter cannot be written: {error}") from None


@dataclass(frozen=True)
class _Found:
    """What is written of one adapter: tensors by name; key: what PEFT looks its rank and alpha up
    by; target: what names it, in target_modules or, of a parameter, in target_parameters; of_all:
    rank and alpha must be those that all have."""

    tensors: dict[str, Any]
    key: str
    rank: int
    alpha: int | float
    target: str
    parameter: bool = False
    of_all: bool = False
    dora: bool = False


def _found(part: Part, tensors: dict[str, Any], key: str, target: str, **options: bool) -> _Found:
    """Scales are written as alpha / r, for rsLoRA too: the same numbers at any rank."""
    rank = len(part.a)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    return _Found(tensors, key, rank, _number(part.scale * rank), target, **options)


def _plain(parts: dict[str, Part], shapes: dict[str, Any], names: PeftNames) -> list[_Found]:
    """All but experts."""
    # PEFT takes each of these names for one of an expert, unless it is that of a parameter.
    taken = set() if names.stacked else {own[2] for n in shapes if (own := split_name(n))}
    own = [name for name in parts if not split_name(name)]
    targets, found = _targets(own, [name for name in shapes if not split_name(name)]), []
    for name in own:
        part, embedding = parts[name], name == names.embed
        pair = (part.b.T, part.a.T) if embedding else (part.a, part.b)
        kinds = _EMBEDDING_KINDS if embedding else _LINEAR_KINDS
        tensors = {f"{name}.{kind}": x for kind, x in zip(kinds, pair, strict=True)}
        if part.magnitude is not None:
            tensors[f"{name}.{_MAGNITUDE}"] = part.magnitude
        parameter, dora = name.split(".")[-1] in taken, part.magnitude is not None
        key = f"{name}.weight" if parameter else name
        target = key if parameter else targets[name]
        found.append(_found(part, tensors, key, target, parameter=parameter, dora=dora))
    return found


def _experts_found(
    parts: dict[str, Part], shapes: dict[str, Any], names: PeftNames
) -> list[_Found]:
    experts = {name: part for name, part in parts.items() if split_name(name)}
    if names.stacked:
        return _wrapped(experts, names)
    taken = {own[2] for name in shapes if (own := split_name(name))}
    # PEFT finds the parameters by the experts' old names, which is wrong where others have those
    # too (and not done for qwen2_moe): then they are named as it would.
    shadowed = any(n.split(".")[-1] in taken for n in shapes if not split_name(n))
    found = []
    for name, part in uniform(with_partners(experts, shapes)).items():
        tensors = {f"{name}.{_LINEAR_KINDS[0]}": part.a, f"{name}.{_LINEAR_KINDS[1]}": part.b}
        last = name.split(".")[-1]
        target = f"experts.{parameter_of(last)}" if shadowed else last
        found.append(_found(part, tensors, name, target, parameter=shadowed, of_all=True))
    return found


def _wrapped(experts: dict[str, Part], names: PeftNames) -> list[_Found]:
    """One adapter for all experts of a parameter."""
    stacks: dict[str, dict[str, dict[str, Part]]] = {}
    for name, part in experts.items():
        stack, _, module = split_name(name) or ("", 0, "")
        stacks.setdefault(stack, {}).setdefault(module, {})[name] = part
    found = []
    for stack, modules in stacks.items():
        adapted = [module for module in names.stacked if module in modules]
        for module in adapted:
            # Wrappers lie around each other; the last parameter's is the outermost.
            inside = ".base_layer" * (len(adapted) - 1 - adapted.index(module))
            own = list(uniform(modules[module]).values())
            pair = {
                f"{stack}{inside}.{k}": x for k, x in zip(_LINEAR_KINDS, wrap(own), strict=True)
            }
            key = f"{stack}.{module}"
            found.append(_found(own[0], pair, key, key, parameter=True))
    return found


def _config(found: list[_Found], first: _Found | None) -> dict[str, Any]:
    ranks = {own.key: own.rank for own in found}
    alphas = {own.key: own.alpha for own in found}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    if first is not None:
        rank, alpha = first.rank, first.alpha
    rank_pattern = {name: r for name, r in ranks.items() if r != rank}
    alpha_pattern = {name: a for name, a in alphas.items() if a != alpha}
    parameters = {own.target for own in found if own.parameter}
    if FUSED_TARGET in parameters:
        # Gate and up, one above the other.
        rank_pattern[f".*{FUSED_TARGET}"], alpha_pattern[f".*{FUSED_TARGET}"] = 2 * rank, 2 * alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({own.target for own in found if not own.parameter}),
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": any(own.dora for own in found),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _targets(adapted: list[str], known: list[str]) -> dict[str, str]:
    """Last parts of names ("q_proj") where all such modules are adapted, else full names."""

    def last(name: str) -> str:
        return name.split(".")[-1]

    partly = {last(name) for name in set(known) - set(adapted)}
    return {name: name if last(name) in partly else last(name) for name in adapted}


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _number(value: float) -> int | float:
    """A whole number as an int, as PEFT writes it; seven digits are all that a float32 knows."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value
