"""PEFT's adapter folder, adapter_config.json and adapter_model.safetensors, as numpy parts.

The tensors' names say which modules are adapted; the config gives ranks, scales and dropout.
Options of PEFT that change the forward pass and are not here are refused by name.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
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

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens"

_PREFIX = "base_model.model."
# PEFT's names of a and b; an embedding's are transposed, its weight being [V, D] = [in, out].
_LINEAR_KINDS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_KINDS = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_BASE_KINDS = ("base_layer.weight", "weight")


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


def read_adapter(folder: Path, shapes: dict[str, tuple[int, int]]) -> tuple[dict[str, Part], float]:
    """(parts by module name, dropout). `shapes`: [out, in] of every module there is.

    UserError for a module that is not in `shapes`, a tensor of another shape, or one left over.
    """
    config = _read_config(folder)
    parts = {}
    for name, tensors in _by_module(_read_tensors(folder), folder).items():
        if name not in shapes:
            tied = " (its head is tied to the embedding)" if name == "lm_head" else ""
            base = config.get("base_model_name_or_path")
            raise UserError(
                f"{folder}: adapts module '{name}', which this model has not{tied}; the adapter "
                f"was made for {base or 'another model'}"
            )
        parts[name] = _part(config, folder, name, tensors, shapes[name])
    if not parts:
        raise UserError(f"{folder / TENSORS}: holds no tensors; save the adapter again")
    return parts, float(config.get("lora_dropout") or 0.0)


# Fields that do not change what a trained adapter computes, and those that `_part` reads.
_KNOWN = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying exclude_modules "
    "inference_mode layers_pattern layers_to_transform loftq_config megatron_config "
    "megatron_core peft_type peft_version qalora_group_size revision runtime_config "
    "target_modules task_type r lora_alpha lora_dropout rank_pattern alpha_pattern "
    "use_rslora use_dora".split()
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
    rank = _lookup(config.get("rank_pattern"), name, config.get("r"))
    alpha = _lookup(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(
            f"{folder / CONFIG}: r and lora_alpha must be numbers, not {rank!r} and {alpha!r}"
        )
    embedding, dora = name == EMBEDDING, bool(config.get("use_dora"))
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
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Part(a, b, scale, magnitude[0] if magnitude else None, base)


def _lookup(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name`, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def write_adapter(
    out: Path, parts: dict[str, Part], known: list[str], dropout: float, base_model: str
) -> None:
    """Writes a folder that PEFT loads; `known` are the names of all modules of the model."""
    tensors = {}
    for name, part in parts.items():
        embedding = name == EMBEDDING
        pair = (part.b.T, part.a.T) if embedding else (part.a, part.b)
        kinds = _EMBEDDING_KINDS if embedding else _LINEAR_KINDS
        for kind, value in zip(kinds, pair, strict=True):
            tensors[f"{_PREFIX}{name}.{kind}"] = np.ascontiguousarray(value)
        if part.magnitude is not None:
            tensors[f"{_PREFIX}{name}.{_MAGNITUDE}"] = part.magnitude
    config = _config(parts, known) | {
        "lora_dropout": dropout,
        "base_model_name_or_path": base_model,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / f"{TENSORS}.tmp", metadata={"format": "pt"})
        (out / f"{CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # The config makes it an adapter folder, so it comes last.
        os.replace(out / f"{TENSORS}.tmp", out / TENSORS)
        os.replace(out / f"{CONFIG}.tmp", out / CONFIG)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: the adapter cannot be written: {error}") from None


def _config(parts: dict[str, Part], known: list[str]) -> dict[str, Any]:
    """Scales are written as alpha / r, for rsLoRA too: the same numbers at any rank."""
    ranks = {name: part.a.shape[0] for name, part in parts.items()}
    alphas = {name: _number(part.scale * ranks[name]) for name, part in parts.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(list(parts), known),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": any(part.magnitude is not None for part in parts.values()),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }


def _targets(adapted: list[str], known: list[str]) -> list[str]:
    """Last parts of names ("q_proj") where all such modules are adapted, else full names."""

    def last(name: str) -> str:
        return name.split(".")[-1]

    partly = {last(name) for name in known if name not in adapted}
    return sorted({name if last(name) in partly else last(name) for name in adapted})


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _number(value: float) -> int | float:
    """A whole number as an int, as PEFT writes it; seven digits are all that a float32 knows."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value
