"""The compressed-tensors layout of quantized linears, both ways, one module at a time, in numpy.

    int-quantized    weight int8 [out, in]; weight_scale [out, 1], [out, groups] or [1];
                     weight_zero_point int8 like the scales, where codes are not symmetric
    pack-quantized   weight_packed int32: codes + 2^(bits - 1) in consecutive bits, first lowest;
                     weight_scale; weight_shape int64 [2]; weight_zero_point packed along `out`
    float-quantized  weight float8_e4m3fn [out, in]; weight_scale [out, 1], [out, groups], [1], or
                     of blocks: [out / block, groups], rounded up
    mxfp4-pack-quantized   weight_packed uint8 [out, in / 2]: E2M1, the first in the low nibble;
                     weight_scale uint8 [out, in / 32]: E8M0

"naive-quantized" is the first or the third. Which module has which is said in config.json
(`compressed_config`). EXTRAS are scales of inputs, which are not read. Source: the library's
compressors, https://github.com/vllm-project/compressed-tensors at 0.20. Other floats (nvfp4, mxfp6,
mxfp8) are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import swap_nibbles
from mud_puppy.model.compressed_bits import (
    pack_words,
    signed,
    unpack_words,
    unsigned,
    words,
)
from mud_puppy.model.mxfp4_format import check_scales
from mud_puppy.model.tensors import checked
from mud_puppy.weights import Int8Dynamic

_FORMATS = {
    "int8": (8, "int"),
    "int4": (4, "int"),
    "fp8_e4m3fn": (8, "float"),
    "mxfp4": (4, "float"),
}


@dataclass(frozen=True)
class Scheme:
    """How one module is stored.

    bits: 4 or 8. group: inputs that share a scale, or "row" or "tensor" (as `kernels.quantize`).
    activations: "none" or "int8" (dynamic, a scale each token). packed: several codes a word.
    type: "int", or "float": float8_e4m3fn of 8 bits, and mxfp4 of 4, which is packed.
    block: rows that share a scale (only read). unrounded: what the config says of inputs that are
    left as they are here ("float8 a token").
    """

    bits: int
    group: int | str = "row"
    symmetric: bool = True
    activations: str = "none"
    packed: bool = False
    type: str = "int"
    block: int = 1
    unrounded: str = ""


EXTRAS = ("input_scale", "input_zero_point")


def scheme_of(w: Quantized | Int8Dynamic, packed: bool | None = None) -> Scheme:
    """The scheme that a leaf is written in; UserError where the layout has none.

    packed: None packs int4 unless its activations are int8 (as llm-compressor does). vLLM runs
    weights without activations from packed ones only, int8 too.
    """
    activations = "int8" if isinstance(w, Int8Dynamic) else "none"
    q = w.base if isinstance(w, Int8Dynamic) else w
    if q.format not in _FORMATS or q.minimum is not None:
        raise UserError(
            "compressed-tensors holds int8, int4, fp8_e4m3fn and mxfp4 with scales and zero "
            f"points, not {q.format}" + (" with minimums" if q.minimum is not None else "")
        )
    (bits, type), group = _FORMATS[q.format], q.group
    if q.format == "mxfp4":
        return Scheme(bits, group, packed=True, type=type)
    if q.scales.shape[-1] == 1:
        group = "row" if q.scales.shape[-2] == q.shape[-2] else "tensor"
    if type == "float":
        if group not in ("row", "tensor"):
            raise UserError(f"compressed-tensors holds no {q.format} in groups of {group}")
        return Scheme(bits, group, type=type)
    if packed is None:
        packed = bits == 4 and activations == "none"
    return Scheme(bits, group, q.zeros is None, activations, packed)


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """The tensors that stand for `{module}.weight`, without "{module}."."""
    names = ("weight_packed" if scheme.packed else "weight", "weight_scale")
    names = (*names, "weight_shape") if scheme.packed and scheme.type == "int" else names
    return names if scheme.symmetric else (*names, "weight_zero_point")


def pack(q: Quantized, scheme: Scheme) -> dict[str, np.ndarray]:
    """The tensors of one module [out, in], by `suffixes`; scales keep their dtype."""
    scales, codes = np.asarray(q.scales), np.asarray(q.codes)
    tensors = {"weight_scale": scales.reshape(1) if scheme.group == "tensor" else scales}
    if scheme.type == "int":
        tensors |= _pack_integers(q, scheme)
    elif scheme.packed:
        tensors["weight_packed"] = swap_nibbles(codes)
    else:
        tensors["weight"] = codes.view(ml_dtypes.float8_e4m3fn)
    return {name: np.ascontiguousarray(tensors[name]) for name in suffixes(scheme)}


def read(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme, dtype: Any
) -> Quantized:
    """The inverse of `pack`, in numpy; dtype: what `dequantize` returns. UserError for tensors that
    are missing, left over, or of another shape than a weight of `shape` has."""
    out, size = shape
    if set(tensors) - set(EXTRAS) != set(suffixes(scheme)):
        raise UserError(f"expected {', '.join(suffixes(scheme))}; got {', '.join(sorted(tensors))}")
    groups = 1 if isinstance(scheme.group, str) else -(-size // scheme.group)
    if isinstance(scheme.group, int) and size % scheme.group:
        raise UserError(f"rows of {size} are not whole groups of {scheme.group}")
    rows = (1,) if scheme.group == "tensor" else (-(-out // scheme.block), groups)
    kind = np.uint8 if scheme.type == "float" and scheme.packed else None
    scales, zeros = checked(tensors, "weight_scale", rows, kind).reshape(-1, groups), None
    if scheme.block > 1:  # a row has its own copy of what it shares
        scales = np.repeat(scales, scheme.block, axis=0)[:out]
    if scheme.type == "int":
        format = f"int{scheme.bits}"
        codes, zeros = _read_integers(tensors, shape, scheme, rows)
    elif scheme.packed:
        format = "mxfp4"
        check_scales(scales, "weight_scale")
        codes = swap_nibbles(checked(tensors, "weight_packed", (out, size // 2), np.uint8))
    else:
        format = "fp8_e4m3fn"
        codes = checked(tensors, "weight", shape, ml_dtypes.float8_e4m3fn).view(np.uint8)
    return Quantized(codes, scales, zeros, format=format, dtype=np.dtype(dtype))


def _pack_integers(q: Quantized, scheme: Scheme) -> dict[str, np.ndarray]:
    """What `pack` returns of codes and zero points."""
    codes, zeros = _codes(q), None if q.zeros is None else np.asarray(q.zeros)
    if zeros is not None and scheme.bits == 8:
        zeros = unsigned(zeros, 128)
    if scheme.packed:
        tensors = {"weight_packed": pack_words(codes, scheme.bits)}
        tensors["weight_shape"] = np.array(codes.shape, np.int64)
        if zeros is not None:
            tensors["weight_zero_point"] = pack_words(zeros.T, scheme.bits).T
        return tensors
    offset = 1 << (scheme.bits - 1)
    tensors = {"weight": signed(codes, offset)}
    return tensors if zeros is None else tensors | {"weight_zero_point": signed(zeros, offset)}


def _read_integers(
    tensors: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    scheme: Scheme,
    rows: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray | None]:
    """codes and zeros of the Quantized; rows: the shape of the scales."""
    (out, size), offset, zeros = shape, 1 << (scheme.bits - 1), None
    if scheme.packed:
        given = checked(tensors, "weight_shape", (2,)).tolist()
        if given != [out, size]:
            raise UserError(f"weight_shape says {given}, expected {[out, size]}")
        stored = checked(tensors, "weight_packed", (out, words(size, scheme.bits)), np.int32)
        codes = unpack_words(stored, scheme.bits, size)
        if not scheme.symmetric:
            packed = words(out, scheme.bits), rows[-1]
            stored = checked(tensors, "weight_zero_point", packed, np.int32)
            zeros = unpack_words(stored.T, scheme.bits, out).T
    else:
        codes = unsigned(checked(tensors, "weight", shape, np.int8), offset)
        if not scheme.symmetric:
            zeros = unsigned(checked(tensors, "weight_zero_point", rows, np.int8), offset)
    if scheme.bits == 8:
        return signed(codes, 128), None if zeros is None else signed(zeros, 128)
    if size % 2:
        raise UserError(f"rows of {size} are odd, and int4 is held in pairs")
    return (codes[:, ::2] << 4) | codes[:, 1::2], zeros


def _codes(q: Quantized) -> np.ndarray:
    """uint8 [out, in], 0 for the lowest code."""
    codes = np.asarray(q.codes)
    if q.format == "int8":
        return unsigned(codes, 128)
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)
