"""GGUF files as if they were HF checkpoints: config, tensors and tokenizer from one file.

Linears are decoded (`gguf.quants`) a block of rows at a time to float32; `gguf_codes` keeps codes.
llama.cpp stores the rows of q and k of llama models with each head's rotary pairs side by side;
they are put back here. The config is `gguf_config`'s.
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
from mud_puppy.model.gguf_config import ROPE_FACTORS, config_fields, metadata
from mud_puppy.model.gguf_header import check_header
from mud_puppy.model.hf_config import to_config
from mud_puppy.model.tensors import Stored

__all__ = ["Encoded", "metadata", "open_gguf", "open_reader"]

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
    config = to_config(config_fields(reader, path), str(path))
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue  # the config has them
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
        check_header(path)
        return gguf.GGUFReader(path)
    except UserError:
        raise
    except Exception as error:  # the reader fails in as many ways as a file can be broken
        raise UserError(
            f"{path}: not a whole GGUF file ({error}); copy or download it again"
        ) from None


def _read(
    tensor: gguf.ReaderTensor, order: np.ndarray | None, a: int, b: int, out: np.ndarray
) -> None:
    rows = tensor.data[a:b] if order is None else tensor.data[order[a:b]]
    try:
        with np.errstate(all="ignore"):  # of scales that are no numbers, which are refused below
            out[...] = gguf.dequantize(rows, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"GGUF tensor '{tensor.name}' is stored as {tensor.tensor_type.name}, which the gguf "
            "package cannot decode; use the safetensors model"
        ) from None
    if not np.isfinite(out).all():
        raise UserError(f"GGUF tensor '{tensor.name}' holds a NaN or an infinity: a corrupt file")
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
    raise UserError(f"{path}: tensor '{name}' is not read from GGUF; use the safetensors model")
