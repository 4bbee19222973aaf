"""GGUF files as llama.cpp's converter and quantizer make them, by the gguf package's own writer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

Kinds = Kind | Callable[[str], Kind]  # how all tensors are stored, or those of each name

# Where the float16 numbers of a block are.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}


def write_gguf(
    path: Path,
    arch: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Kinds = Kind.F32,
    with_tokenizer: bool = False,
) -> Path:
    """A file of these tensors by llama.cpp's names, vectors in float32; fields: metadata without
    the architecture's name, those that are None left out."""
    writer = gguf.GGUFWriter(path, arch)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    if with_tokenizer:
        add_tokenizer(writer)
    for name, w in tensors.items():
        kind: Any = kinds(name) if callable(kinds) else kinds
        kind = Kind.F32 if w.ndim == 1 else kind
        writer.add_tensor(name, encoded(np.ascontiguousarray(w), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(w: np.ndarray, kind: Kind) -> np.ndarray:
    """The rows as blocks; those that the gguf package cannot encode are random ones instead."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return gguf.quantize(np.asarray(w, np.float32), kind)
    seed = int(np.abs(w.reshape(-1)[0]) * 1e6)
    return random_blocks(len(w), w.shape[1] // 256, kind, seed).reshape(len(w), -1)


def random_blocks(out: int, blocks: int, kind: Kind, seed: int = 0) -> np.ndarray:
    """uint8 [out, blocks, bytes], every bit random but the scales: weights of about 0.1."""
    random = np.random.default_rng(seed)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rows = random.integers(0, 256, (out, blocks, size)).astype(np.uint8)
    for at in HALVES[kind.name]:
        scale = 0.1 / {"Q4_K": 300, "Q6_K": 1500}.get(kind.name, 8)
        values = random.uniform(0.5, 1.5, (out, blocks, 1)) * scale * (8 if at == 2 else 1)
        rows[..., at : at + 2] = values.astype(np.float16).view(np.uint8)
    return rows


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (convert_hf_to_gguf.py, `permute`)."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Bytes, one merge and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, "sa", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["s a"])
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)


def llama_tensors(
    weights: Mapping[str, np.ndarray], heads: int, kv_heads: int
) -> dict[str, np.ndarray]:
    """The tensors of a llama by their names in GGUF."""
    tensors = {}
    for name, w in weights.items():
        rows = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        tensors[gguf_name(name)] = permuted(w, rows) if rows else w
    return tensors


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str, names: Mapping[str, str] = _NAMES) -> str:
    """llama.cpp's name of a tensor; names: of the modules."""
    name = name.replace("model.layers.", "blk.")
    for hf, own in names.items():
        name = name.replace(f"{hf}.", f"{own}.")
    return name
