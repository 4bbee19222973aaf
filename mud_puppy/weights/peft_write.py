"""Writing PEFT's adapter folder: the tensors by HF's names, and a config that PEFT finds them by.

What PEFT asks of experts, and of modules beside them that have their names, is in `peft_experts`.
"""

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mud_puppy.errors import UserError
from mud_puppy.weights.peft_experts import (
    FUSED_TARGET,
    Part,
    parameter_of,
    split_name,
    uniform,
    with_partners,
    wrap,
)
from mud_puppy.weights.peft_names import (
    CONFIG,
    EMBEDDING_KINDS,
    LINEAR_KINDS,
    MAGNITUDE,
    PREFIX,
    TASKS,
    TENSORS,
    PeftNames,
)

log = logging.getLogger("mud_puppy")


def write_adapter(
    out: Path,
    parts: dict[str, Part],
    shapes: dict[str, tuple[int, int]],
    names: PeftNames,
    dropout: float,
    base_model: str,
    score: dict[str, np.ndarray],
) -> None:
    """Writes a folder that PEFT loads; parts and shapes ([out, in] of every module of the model) by
    our names; score: tensors of a head of scores, none of a language model."""
    parts = {names.theirs(name): part for name, part in parts.items()}
    shapes = {names.theirs(name): shape for name, shape in shapes.items()}
    found = _plain(parts, shapes, names) + _experts_found(parts, shapes, names)
    # A module's rank and scale go by its own name, but those of experts that PEFT has still to make
    # parameters of go by the adapter's.
    first = next((own for own in found if own.of_all), None)
    config = _config(found, first) | _base_fields(base_model)
    config["task_type"] = TASKS[names.task]
    config["modules_to_save"] = [names.head] if score else None
    config["lora_dropout"] = dropout
    if dropout and (config["target_parameters"] or first):
        log.warning("%s: lora_dropout %s is written as 0: PEFT has none for experts", out, dropout)
        config["lora_dropout"] = 0.0
    config["fan_in_fan_out"] = names.conv1d
    tensors = {f"{PREFIX}{name}": x for own in found for name, x in own.tensors.items()}
    tensors |= {f"{PREFIX}{names.head}.{kind}": x for kind, x in score.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / f"{TENSORS}.tmp", metadata={"format": "pt"})
        (out / f"{CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # The config makes it an adapter folder, so it comes last.
        os.replace(out / f"{TENSORS}.tmp", out / TENSORS)
        os.replace(out / f"{CONFIG}.tmp", out / CONFIG)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: the adapter cannot be written: {error}") from None


def _base_fields(source: str) -> dict[str, Any]:
    """A model's source; a hub id may name a revision, `org/name@revision`."""
    repo, _, revision = (source, "", "") if Path(source).is_absolute() else source.partition("@")
    return {"base_model_name_or_path": repo, "revision": revision or None}


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
        kinds = EMBEDDING_KINDS if embedding else LINEAR_KINDS
        tensors = {f"{name}.{kind}": x for kind, x in zip(kinds, pair, strict=True)}
        if part.magnitude is not None:
            tensors[f"{name}.{MAGNITUDE}"] = part.magnitude
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
        tensors = {f"{name}.{LINEAR_KINDS[0]}": part.a, f"{name}.{LINEAR_KINDS[1]}": part.b}
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
            pair = {f"{stack}{inside}.{k}": x for k, x in zip(LINEAR_KINDS, wrap(own), strict=True)}
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
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({own.target for own in found if not own.parameter}),
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "init_lora_weights": True,
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
