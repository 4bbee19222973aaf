"""GGUF files as if they were HF checkpoints: config, tensors and tokenizer from one file.

Linears are decoded (`gguf.quants`) a block of rows at a time to float32; `gguf_codes` keeps codes.
llama.cpp stores the rows of q and k of llama models with each head's rotary pairs side by side;
they are put back here.
Metadata that would change the model and that nothing here reads is refused.
Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.model.hf_config import to_config
from mud_puppy.model.tensors import Stored

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class Encoded(Stored):
    """A tensor of a GGUF file; `read` decodes its rows.

    type: GGUF's name for how it is stored. blocks(): a copy of its bytes, uint8 [rows, bytes], the
    rows in HF's order.
    """

    type: str
    blocks: Callable[[], np.ndarray]


def open_gguf(path: Path) -> tuple[Any, dict[str, Stored]]:
    """(transformers config, tensors by HF name); rows are read in float32."""
    reader = open_reader(path)
    config = to_config(_config(reader, path), str(path))
    tensors = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name, path)
        order = None
        if config.model_type in ("llama", "mistral") and "self_attn.q_proj" in name:
            order = _rotary_order(len(tensor.data), config.num_attention_heads)
        if config.model_type in ("llama", "mistral") and "self_attn.k_proj" in name:
            order = _rotary_order(len(tensor.data), config.num_key_value_heads)
        tensors[name] = Encoded(
            tuple(int(size) for size in reversed(tensor.shape)),
            np.dtype(np.float32),
            partial(_read, tensor, order),
            f"{path}: tensor '{tensor.name}'",
            type=tensor.tensor_type.name,
            blocks=partial(_blocks, tensor, order),
        )
    return config, tensors


def open_reader(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader fails in as many ways as a file can be broken
        raise UserError(
            f"{path}: not a whole GGUF file ({error}); copy or download it again"
        ) from None


def metadata(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _read(
    tensor: gguf.ReaderTensor, order: np.ndarray | None, a: int, b: int, out: np.ndarray
) -> None:
    rows = tensor.data[a:b] if order is None else tensor.data[order[a:b]]
    try:
        out[...] = gguf.dequantize(rows, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"GGUF tensor '{tensor.name}' is stored as {tensor.tensor_type.name}, which the gguf "
            "package cannot decode; use the safetensors model"
        ) from None
    _forget(tensor)


def _blocks(tensor: gguf.ReaderTensor, order: np.ndarray | None) -> np.ndarray:
    rows = np.array(tensor.data) if order is None else tensor.data[order]
    _forget(tensor)
    return rows.view(np.uint8)


def _forget(tensor: gguf.ReaderTensor) -> None:
    """The pages that were read would count as this process's memory."""
    _mapping(tensor.data).madvise(mmap.MADV_DONTNEED)


def _mapping(array: Any) -> mmap.mmap:
    while not isinstance(array, mmap.mmap):
        array = array.base
    return array


def _rotary_order(rows: int, heads: int) -> np.ndarray:
    """Row of the file that holds each HF row: (2 d + h) of a head for HF's (h * hd/2 + d)."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _hf_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    parts = stem.split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{kind}"
    hint = " (Llama 3.1's frequency scaling)" if stem == "rope_freqs" else ""
    raise UserError(
        f"{path}: tensor '{name}'{hint} is not read from GGUF; use the safetensors model"
    )


def _config(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """The fields of a config.json."""
    family = metadata(reader, "general.architecture")
    if family not in _ARCHITECTURES:
        raise UserError(
            f"{path}: GGUF architecture '{family}' is not read; "
            f"architectures that load: {', '.join(_ARCHITECTURES)}"
        )
    start = f"{family}."
    given = {
        key.removeprefix(start): metadata(reader, key)
        for key in reader.fields
        if key.startswith(start)
    }
    try:
        fields = _fields(given, family, {tensor.name: tensor.shape for tensor in reader.tensors})
    except KeyError as error:
        raise UserError(f"{path}: GGUF entry '{error.args[0]}' is missing") from None
    if given:
        raise UserError(
            f"{path}: GGUF metadata that is not understood: "
            + ", ".join(f"{start}{key}={value!r}" for key, value in sorted(given.items()))
        )
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


def _short(value: float) -> float:
    """1e-5 for the float32 9.99999974e-06: the number that was written."""
    return float(str(np.float32(value)))
