"""Reading PEFT's adapter folder, adapter_config.json and adapter_model.safetensors, as numpy parts.

The tensors' names say which modules are adapted; the config gives ranks, scales and dropout.
Options of PEFT that change the forward pass and are not here are refused by name.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mud_puppy.errors import UserError, nearest_file
from mud_puppy.weights.peft_experts import (
    Part,
    is_wrapped,
    modules_of,
    split_name,
    unwrap,
    wrapped_parameter,
)
from mud_puppy.weights.peft_names import (
    CONFIG,
    EMBEDDING,
    EMBEDDING_KINDS,
    LINEAR_KINDS,
    MAGNITUDE,
    PREFIX,
    SCORES,
    TASKS,
    TENSORS,
    ours,
)

_BASE_KINDS = ("base_layer.weight", "weight")


@dataclass(frozen=True)
class Adapter:
    """parts by our names of modules; score: "weight" (and "bias") of the head of scores that was
    trained beside them, as stored."""

    parts: dict[str, Part]
    dropout: float = 0.0
    score: dict[str, np.ndarray] = field(default_factory=dict)


def read_adapter(folder: Path, shapes: dict[str, tuple[int, int]]) -> Adapter:
    """`shapes`: [out, in] of every module there is.

    UserError for a module that is not in `shapes`, a tensor of another shape, or one left over.
    """
    config = _read_config(folder)
    score, tensors = _score(_read_tensors(folder), folder)
    modules = _by_module(tensors, folder)
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
    return Adapter(parts, float(config.get("lora_dropout") or 0.0), score)


def adapter_head(folder: str | Path) -> tuple[str, int] | None:
    """(task, labels) of the head of scores that an adapter brings, None where it brings none: what
    its base is given before it loads (`with_score_head`)."""
    folder = Path(folder).expanduser()
    config, (score, _) = _read_config(folder), _score(_read_tensors(folder), folder)
    if not score:
        return None
    # TRL's say no task_type. Only token classifiers have a bias.
    said = config.get("task_type") == TASKS["token"] or "bias" in score
    return ("token" if said else "sequence"), len(score["weight"])


def _score(
    tensors: dict[str, np.ndarray], folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of a head of scores, by kind, and all others."""
    kinds = {f"{PREFIX}{name}.{kind}": kind for name in SCORES for kind in ("weight", "bias")}
    score = {kinds[name]: x for name, x in tensors.items() if name in kinds}
    if score and ("weight" not in score or score["weight"].ndim != 2):
        raise UserError(f"{folder / TENSORS}: its head of scores has no weight [labels, D]")
    return score, {name: x for name, x in tensors.items() if name not in kinds}


def _unknown(config: dict[str, Any], folder: Path, name: str, theirs: str) -> UserError:
    why = " (its head is tied to the embedding)" if name == "lm_head" else ""
    if name in SCORES:
        why = ' as a linear: a head of scores is trained whole (modules_to_save ["score"])'
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
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and all(name in SCORES for name in saved):
        del config["modules_to_save"]
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
    kinds = (*LINEAR_KINDS, *EMBEDDING_KINDS, MAGNITUDE, *_BASE_KINDS)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
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
    kinds = EMBEDDING_KINDS if embedding else LINEAR_KINDS
    out_dim, in_dim = shape[::-1] if embedding else shape
    expected = {kinds[0]: (rank, in_dim), kinds[1]: (out_dim, rank)}
    expected |= {MAGNITUDE: (out_dim,)} if dora else {}
    _check_shapes(folder, name, tensors, expected)
    if extra := set(tensors) - set(expected) - set(_BASE_KINDS):
        raise UserError(f"{folder}: tensor '{PREFIX}{name}.{min(extra)}' has no use here")
    a, b, *magnitude = (tensors[kind].astype(np.float32) for kind in expected)
    a, b = (b.T, a.T) if embedding else (a, b)
    base = next((tensors[kind] for kind in _BASE_KINDS if kind in tensors), None)
    return Part(a, b, _scale(config, rank, alpha), magnitude[0] if magnitude else None, base)


def _check_shapes(
    folder: Path, name: str, tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]
) -> None:
    for kind, size in expected.items():
        found = tensors[kind].shape if kind in tensors else "missing"
        if found != size:
            raise UserError(
                f"{folder}: tensor '{PREFIX}{name}.{kind}' is {found}; "
                f"the adapter's config and the base model say {size}"
            )


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
    sides = (total, inputs), (rows, total)
    _check_shapes(folder, name, tensors, dict(zip(LINEAR_KINDS, sides, strict=True)))
    a, b = (tensors[kind].astype(np.float32) for kind in LINEAR_KINDS)
    scale, ends = _scale(config, rank, alpha), np.cumsum([out for out, _ in sizes])[:-1]
    return {
        module: Part(own_a, own_b, scale)
        for names, (own_a, rows_b) in zip(experts, unwrap(a, b, len(experts)), strict=True)
        for module, own_b in zip(names, np.split(rows_b, ends), strict=True)
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
