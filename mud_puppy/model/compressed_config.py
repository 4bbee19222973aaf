"""config.json's `quantization_config` of compressed-tensors, written and read.

Source: https://github.com/vllm-project/compressed-tensors at 0.20, quantization/quant_config.py and
utils/match.py. What this project does not read (nvfp4, sparsity, quantized caches) is refused by
name, never skipped. Inputs are rounded where they are int8 with a scale each token; in other ways
(float8, scales of the file) they are not, which `Scheme.unrounded` says.
"""

import re
from collections.abc import Mapping
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.compressed_tensors import Scheme

Config = Mapping[str, Any]

# Whether codes are packed, and of which types.
_FORMATS = {
    "pack-quantized": (True, ["int"]),
    "int-quantized": (False, ["int"]),
    "float-quantized": (False, ["float"]),
    "mxfp4-pack-quantized": (True, ["float"]),
    "naive-quantized": (False, ["int", "float"]),
}


def quantization_config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """config.json's `quantization_config` for the linear modules of a model by their HF names.

    None: stored as it is, which a head always is unless named (a tied head is a module too).
    """
    modules = {"lm_head": None, **schemes}
    kinds = sorted({s for s in modules.values() if s is not None}, key=repr)
    if not kinds:
        raise UserError("no module is quantized: there is nothing for compressed-tensors to say")
    groups = {}
    for i, scheme in enumerate(kinds):
        names = [m for m, s in modules.items() if s == scheme]
        if len(kinds) == 1:
            names = ["Linear", *(name for name in names if _class(name) != "Linear")]
        groups[f"group_{i}"] = _group(scheme, names)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": [name for name, scheme in modules.items() if scheme is None],
    }


def scheme_for(config: Config, module: str) -> Scheme | None:
    """The scheme of a module (its HF name) by a `quantization_config`; None: it is not quantized.

    Targets and ignored modules are names, "re:" and an expression that the name begins with, or the
    class (Linear or Embedding). UserError for what this project does not read.
    """
    _check_whole(config)
    if any(_named(module, entry) or _class(module) == entry for entry in config["ignore"] or ()):
        return None
    groups = {t: group for group in config["config_groups"].values() for t in _targets(group)}
    # A name goes before an expression, and both before the class.
    hits = [t for t in sorted(groups, key=lambda t: ("re:" in t, t)) if _named(module, t)]
    hits += [t for t in groups if t == _class(module)]
    return _scheme(groups[hits[0]], config) if hits else None


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": {"row": "channel", "tensor": "tensor"}.get(str(scheme.group), "group"),
        "group_size": scheme.group if isinstance(scheme.group, int) else None,
        "dynamic": False,
    }
    if (scheme.type, scheme.packed) == ("float", True):
        weights["scale_dtype"] = "torch.uint8"
    tokens = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None if scheme.activations == "none" else tokens,
        "output_activations": None,
        "format": next(f for f, kind in _FORMATS.items() if kind == (scheme.packed, [scheme.type])),
    }


def _check_whole(config: Config) -> None:
    """What concerns the model as a whole, and is not read here."""
    if (status := config.get("quantization_status")) != "compressed":
        raise UserError(f"quantization_status is '{status}': only compressed weights are read")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        value = config.get(name)
        if value and not (name == "sparsity_config" and value.get("format") == "dense"):
            raise UserError(f"quantization_config has a {name}, which is not supported")


def _targets(group: Any) -> list[str]:
    if not isinstance(group, Mapping):
        raise UserError(f"a config group is a preset's targets {group}: write the scheme out")
    return list(group["targets"])


def _scheme(group: Config, config: Config) -> Scheme | None:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        return None
    format = group.get("format") or config.get("format")
    _require("format", format, list(_FORMATS))
    packed, types = _FORMATS[str(format)]
    type, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    symmetric, size = weights.get("symmetric", True), weights.get("group_size")
    strategy = weights.get("strategy") or _strategy(size)
    _require(f"type of {format} weights", type, types)
    _require("weights dynamic", weights.get("dynamic", False), [False])
    _require("weights actorder", weights.get("actorder"), [None, False, "weight", "static"])
    _require("output_activations", group.get("output_activations"), [None])
    if type == "float":
        _check_floats(bits, packed, symmetric, strategy, size)
    else:
        _check_integers(bits, symmetric, strategy)
    if strategy == "block":
        block, size = _block(weights.get("block_structure"))
    else:
        block, size = 1, {"tensor": "tensor", "channel": "row", "group": size}[strategy]
    if not isinstance(size, str) and not (isinstance(size, int) and size > 0):
        raise UserError(f"quantization_config: weights group_size is {size!r}, not a size")
    activations, unrounded = _inputs(inputs, type == "int" and (bits == 4 or symmetric))
    return Scheme(bits, size, symmetric, activations, packed, type, block, unrounded)


def _check_integers(bits: Any, symmetric: Any, strategy: Any) -> None:
    _require("weights num_bits", bits, [4, 8])
    _require("weights strategy", strategy, ["tensor", "channel", "group"])
    if not symmetric:
        _require("asymmetric weights strategy", strategy, ["channel", "group"])


def _check_floats(bits: Any, packed: bool, symmetric: Any, strategy: Any, size: Any) -> None:
    """float8_e4m3fn with scales of rows, groups, blocks or of the weight; mxfp4 is packed."""
    what = f"{'packed ' if packed else ''}float weights"
    known = ["group"] if packed else ["tensor", "channel", "group", "block"]
    _require(f"{what} num_bits", bits, [4 if packed else 8])
    _require(f"{what} symmetric", symmetric, [True])
    _require(f"{what} strategy", strategy, known)
    if packed:
        _require(f"{what} group_size", size, [32])


def _block(structure: Any) -> tuple[int, int]:
    """Rows and inputs that share a scale."""
    if not (isinstance(structure, list | tuple) and len(structure) == 2) or any(
        not isinstance(size, int) or size < 1 for size in structure
    ):
        raise UserError(f"quantization_config: block_structure is {structure!r}, not two sizes")
    return structure[0], structure[1]


def _inputs(inputs: Config | None, integers: bool) -> tuple[str, str]:
    """`Scheme.activations` and `unrounded`; integers: the weights' codes are whole numbers times
    a scale, which products of rounded inputs need."""
    if inputs is None:
        return "none", ""
    bits, strategy = inputs.get("num_bits", 8), inputs.get("strategy")
    kind, dynamic = inputs.get("type", "int"), inputs.get("dynamic", False)
    known = (kind, bits, strategy, dynamic, inputs.get("symmetric", True))
    if integers and known == ("int", 8, "token", True, True):
        return "int8", ""
    scales = f"a {strategy}" if dynamic else f"a {strategy}, with scales of the file"
    return "none", f"{kind}{bits} {scales}"


def _strategy(group_size: int | None) -> str:
    return "tensor" if group_size is None else "channel" if group_size == -1 else "group"


def _require(what: str, value: Any, known: list) -> None:
    if value not in known:
        raise UserError(
            f"quantization_config: {what} is {value!r}; supported: {', '.join(map(repr, known))}"
        )


def _named(module: str, entry: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry == module


def _class(module: str) -> str:
    return "Embedding" if module.endswith("embed_tokens") else "Linear"
