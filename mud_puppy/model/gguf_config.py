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
from mud_puppy.model.rope import read_rope

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"


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
    start = f"{family}."
    given = {
        key.removeprefix(start): metadata(reader, key)
        for key in reader.fields
        if key.startswith(start)
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        fields = _fields(given, family, {name: t.shape for name, t in tensors.items()})
    except KeyError as error:
        raise UserError(f"{path}: GGUF entry '{error.args[0]}' is missing") from None
    if given:
        raise UserError(
            f"{path}: GGUF metadata that is not understood: "
            + ", ".join(f"{start}{key}={value!r}" for key, value in sorted(given.items()))
        )
    if ROPE_FACTORS in tensors:
        fields["rope_parameters"] = _llama3(fields, tensors[ROPE_FACTORS], path)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{key}_token_id"] = metadata(reader, f"tokenizer.ggml.{name}_token_id")
    return fields


def _fields(given: dict[str, Any], family: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Config fields from the architecture's metadata, which is taken out of `given`."""
    heads = given.pop("attention.head_count")
    width = given.pop("embedding_length")
    fields = {
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"][1]),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": given.pop("block_count"),
        "intermediate_size": given.pop("feed_forward_length"),
        "num_key_value_heads": given.pop("attention.head_count_kv", heads),
        "rms_norm_eps": _short(given.pop("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": given.pop("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(given),
    }
    head_dim = given.pop("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        # Another value would be a partial rotation or a second head size: left as not understood.
        if given.get(key) == head_dim:
            del given[key]
    if given.get("vocab_size") == fields["vocab_size"]:
        del given["vocab_size"]
    if family != "qwen2":
        fields["head_dim"] = head_dim
    elif head_dim != width // heads:
        given["attention.key_length"] = head_dim
    if family == "llama" and "attention.sliding_window" in given:
        # Files of Mistral models say llama.
        window = given.pop("attention.sliding_window")
        return fields | {"model_type": "mistral", "sliding_window": window}
    if family == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return fields


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    spec = {"rope_type": "default", "rope_theta": _short(given.pop("rope.freq_base", 10000.0))}
    kind = given.pop("rope.scaling.type", "none")
    if kind != "none":
        spec |= {"rope_type": kind, "factor": _short(given.pop("rope.scaling.factor"))}
        given.pop("rope.scaling.finetuned", None)
    if kind == "yarn":
        spec["original_max_position_embeddings"] = given.pop("rope.scaling.original_context_length")
    return spec


def _llama3(fields: dict[str, Any], tensor: gguf.ReaderTensor, path: Path) -> dict[str, Any]:
    """`rope_parameters` of the numbers that divide each frequency, which llama.cpp writes for
    Llama 3.1 to 3.3 instead of the rule they are made by. UserError for other numbers."""
    factors, plain = np.asarray(tensor.data, np.float32).reshape(-1), fields["rope_parameters"]
    # The published rule; only `factor`, the largest of them, differs between models.
    spec = plain | {
        "rope_type": "llama3",
        "factor": _short(factors.max(initial=0)),
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
            f"{path}: tensor '{ROPE_FACTORS}' holds other numbers than Llama 3.1's rule of "
            "frequencies gives; use the safetensors model"
        )
    return spec


def _short(value: float) -> float:
    """1e-5 for the float32 9.99999974e-06: the number that was written."""
    return float(str(np.float32(value)))
