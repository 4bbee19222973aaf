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
from mud_puppy.model.gguf_architectures import ARCHITECTURES
from mud_puppy.model.gguf_config import FACTORS, config_fields, metadata
from mud_puppy.model.gguf_header import check_header
from mud_puppy.model.gguf_names import hf_names
from mud_puppy.model.hf_config import to_config
from mud_puppy.model.tensors import Stored

__all__ = ["Encoded", "metadata", "open_gguf", "open_reader"]


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
    family = metadata(reader, "general.architecture")
    names, tensors = hf_names(family, config), {}
    for tensor in reader.tensors:
        if tensor.name in FACTORS:
            continue  # the config has them
        if tensor.name not in names:
            raise UserError(
                f"{path}: tensor '{tensor.name}' is not read from GGUF; use the safetensors model"
            )
        shape, own = tuple(int(size) for size in reversed(tensor.shape)), names[tensor.name]
        experts = len(own) > 1
        if experts and (len(shape) != 3 or shape[0] != len(own)):
            raise UserError(
                f"{path}: tensor '{tensor.name}' has shape {shape}, but the config says "
                f"{len(own)} experts"
            )
        for e, name in enumerate(own):
            data = tensor.data[e] if experts else tensor.data
            order = _order(name, len(data), config) if ARCHITECTURES[family].rotary else None
            offset = ARCHITECTURES[family].norm_offset if name.endswith("norm.weight") else 0.0
            tensors[name] = Encoded(
                shape[1:] if experts else shape,
                np.dtype(np.float32),
                partial(_read, tensor, data, order, offset),
                f"{path}: tensor '{tensor.name}'",
                type=tensor.tensor_type.name,
                blocks=partial(_blocks, data, order),
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
    tensor: gguf.ReaderTensor,
    data: np.ndarray,
    order: np.ndarray | None,
    offset: float,
    a: int,
    b: int,
    out: np.ndarray,
) -> None:
    rows = data[a:b] if order is None else data[order[a:b]]
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
    if offset:
        out -= np.float32(offset)
    _forget(data)


def _blocks(data: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    rows = np.array(data) if order is None else data[order]
    _forget(data)
    return rows.view(np.uint8)


def _forget(data: np.ndarray) -> None:
    """The pages that were read would count as this process's memory."""
    _mapping(data).madvise(mmap.MADV_DONTNEED)


def _mapping(array: Any) -> mmap.mmap:
    while not isinstance(array, mmap.mmap):
        array = array.base
    return array


def _order(name: str, rows: int, config: Any) -> np.ndarray | None:
    """Row of the file that holds each HF row of q and k: (2 d + h) of a head for HF's
    (h * hd/2 + d); None: its own."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (count := heads.get(name.split(".")[-2])) is None:
        return None
    return np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1)
