"""The metadata of a GGUF file as the fields of a config.json.

Every entry of the architecture is taken out of what is `given`; what is left over would change the
model without our knowing, and is refused. Names of entries:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.model.gguf_architectures import ARCHITECTURES, Architecture, short
from mud_puppy.model.limits import check_sizes
from mud_puppy.model.rope import read_rope

# What is told by the config, not a weight.
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def metadata(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def config_fields(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """The fields of a config.json."""
    family = metadata(reader, "general.architecture")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{path}: GGUF architecture '{family}' is not read; "
            f"architectures that load: {', '.join(ARCHITECTURES)}"
        )
    if (parts := metadata(reader, "split.count", 1)) > 1:
        raise UserError(
            f"{path}: one of {parts} parts of a model, which are not read: join them with "
            "llama-gguf-split --merge"
        )
    start = f"{family}."
    given = {
        key.removeprefix(start): metadata(reader, key)
        for key in reader.fields
        if key.startswith(start)
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        fields = _fields(given, ARCHITECTURES[family], tensors)
    except KeyError as error:
        raise UserError(f"{path}: GGUF entry '{error.args[0]}' is missing") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:  # texts where numbers should be
        raise UserError(f"{path}: GGUF metadata of another kind than expected: {error}") from None
    if given:
        raise UserError(
            f"{path}: GGUF metadata that is not understood: "
            + ", ".join(f"{start}{key}={value!r}" for key, value in sorted(given.items()))
        )
    if FACTORS[0] in tensors:
        fields["rope_parameters"] = _llama3(fields, tensors[FACTORS[0]], path)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{key}_token_id"] = metadata(reader, f"tokenizer.ggml.{name}_token_id")
    return fields


def _fields(
    given: dict[str, Any], architecture: Architecture, tensors: dict[str, Any]
) -> dict[str, Any]:
    """Config fields from the architecture's metadata, which is taken out of `given`."""
    heads, width = _count(given, "attention.head_count"), _count(given, "embedding_length")
    head_dim = _count(given, "attention.key_length", width // heads)
    fields = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": _count(given, "block_count"),
        "intermediate_size": _count(given, "feed_forward_length"),
        "num_key_value_heads": _count(given, "attention.head_count_kv", heads),
        "max_position_embeddings": _count(given, "context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "head_dim": head_dim,
    }
    if "attention.layer_norm_epsilon" in given:
        fields["norm_epsilon"] = short(given.pop("attention.layer_norm_epsilon"))
    else:
        fields["rms_norm_eps"] = short(given.pop("attention.layer_norm_rms_epsilon"))
    fields["rope_parameters"] = _rope(given, tensors)
    if FACTORS[1] in tensors and given.get("rope.dimension_count", head_dim) != head_dim:
        fields["partial_rotary_factor"] = given.pop("rope.dimension_count") / head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        # Another value would be a partial rotation or a second head size: left as not understood.
        if given.get(key) == head_dim:
            del given[key]
    if given.get("vocab_size") == fields["vocab_size"]:
        del given["vocab_size"]
    check_sizes(fields, "GGUF metadata")
    fields |= architecture.fields(given, fields, tensors)
    if not architecture.head_dim:
        del fields["head_dim"]
        if head_dim != width // heads:
            given["attention.key_length"] = head_dim
    return fields


def _count(given: dict[str, Any], key: str, *default: int) -> int:
    value = given.pop(key, *default)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"GGUF entry '{key}' is {str(value)[:100]}, expected a whole number from 1")
    return value


def _rope(given: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {"rope_type": "default"}
    spec["rope_theta"] = short(given.pop("rope.freq_base", 10000.0))
    kind = given.pop("rope.scaling.type", "none")
    if kind != "none":
        spec |= {"rope_type": kind, "factor": short(given.pop("rope.scaling.factor"))}
        given.pop("rope.scaling.finetuned", None)
    if kind == "yarn":
        spec["original_max_position_embeddings"] = given.pop("rope.scaling.original_context_length")
    return spec if FACTORS[1] not in tensors else _longrope(spec, given, tensors)


def _longrope(
    spec: dict[str, Any], given: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, Any]:
    """Phi 3's two lists of numbers that divide the frequencies, which are tensors here."""
    lists = (np.asarray(tensors[name].data, np.float32).reshape(-1) for name in FACTORS[1:])
    near, far = ([short(float(x)) for x in numbers] for numbers in lists)
    return spec | {
        "rope_type": "longrope",
        "short_factor": near,
        "long_factor": far,
        "original_max_position_embeddings": given["rope.scaling.original_context_length"],
        "attention_factor": short(given.pop("rope.scaling.attn_factor")),
    }


def _llama3(fields: dict[str, Any], tensor: gguf.ReaderTensor, path: Path) -> dict[str, Any]:
    """`rope_parameters` of the numbers that divide each frequency, which llama.cpp writes for
    Llama 3.1 to 3.3 instead of the rule they are made by. UserError for other numbers."""
    factors, plain = np.asarray(tensor.data, np.float32).reshape(-1), fields["rope_parameters"]
    # The published rule; only `factor`, the largest of them, differs between models.
    spec = plain | {
        "rope_type": "llama3",
        "factor": short(float(factors.max(initial=0))),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    dim, limit = fields.get("head_dim", 2 * len(factors)), fields["max_position_embeddings"]
    fits = plain["rope_type"] == "default" and len(factors) == dim // 2 and spec["factor"] >= 1
    if fits:
        own, base = (np.array(read_rope(s, dim, limit).inv_freq) for s in (spec, plain))
        fits = np.allclose(own * factors, base, rtol=1e-5, atol=0)
    if not fits:
        raise UserError(
            f"{path}: tensor '{FACTORS[0]}' holds other numbers than Llama 3.1's rule of "
            "frequencies gives; use the safetensors model"
        )
    return spec
